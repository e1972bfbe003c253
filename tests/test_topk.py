"""The selected parameters are those that a full sort would give."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from guided_dropout.errors import ArtefactError, DataError
from guided_dropout.fisher.topk import select

FLOAT32 = st.floats(0, float(np.finfo(np.float32).max), width=32)
FEW = st.sampled_from([0.0, -0.0, 1e-45, 1.1754944e-38, 1e-12, 1.0, 1.0000001, 3.4028235e38])
TENSORS = st.lists(st.lists(FEW | FLOAT32, max_size=12), min_size=1, max_size=5)


def by_sorting(tensors, count, largest):
    """Boolean masks from a stable sort of everything, so that equal values stand by position."""
    everything = torch.cat([t.flatten().double() for t in tensors.values()])
    chosen = torch.zeros(len(everything), dtype=torch.bool)
    chosen[(-everything if largest else everything).argsort(stable=True)[:count]] = True
    parts = chosen.split([t.numel() for t in tensors.values()])
    return {name: part.view(t.shape) for (name, t), part in zip(tensors.items(), parts, strict=True)}


def assert_is_the_sorted_selection(selection, tensors, count, largest):
    want = by_sorting(tensors, count, largest)
    assert selection.count == count
    assert selection.counts == {name: int(m.sum()) for name, m in want.items()}
    for name, mask in selection.masks():
        assert mask.dtype == torch.bool
        assert torch.equal(mask, want[name]), name


@settings(deadline=None)
@given(
    lists=TENSORS,
    fraction=st.floats(0, 1),
    largest=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
@example(lists=[[1.0, 0.0], [-0.0, 0.0]], fraction=0.5, largest=False, dtype=torch.float32)
def test_agrees_with_sorting(lists, fraction, largest, dtype):
    tensors = {str(i): torch.tensor(values, dtype=dtype) for i, values in enumerate(lists)}
    size = sum(map(len, lists))
    selection = select(tensors, fraction, largest=largest)
    assert selection.num_ranked == size
    assert_is_the_sorted_selection(selection, tensors, int(np.floor(fraction * size + 0.5)), largest)


@pytest.mark.parametrize("largest", [True, False])
def test_large_tensors_of_several_kinds(largest):
    generator = torch.Generator().manual_seed(0)
    big = torch.rand(2100, 2100, generator=generator) ** 8
    tensors = {
        "big": torch.where(big < 1e-6, 0, big),
        "coarse": torch.rand(300, 7, generator=generator).to(torch.bfloat16),
        "scalar": torch.tensor(0.5),
    }
    size = sum(t.numel() for t in tensors.values())
    selection = select(tensors, 0.2, largest=largest)
    assert_is_the_sorted_selection(selection, tensors, round(0.2 * size), largest)


def test_values_beyond_float32_are_told_apart():
    tensors = {"a": torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64), "b": torch.tensor([1.0, 0.5])}
    assert select(tensors, 0.25).mask("a").tolist() == [False, True]
    assert select(tensors, 0.5).mask("a").tolist() == [True, True]
    assert select(tensors, 0.75).mask("b").tolist() == [True, False]


def test_excluded_tensors_are_neither_counted_nor_chosen():
    tensors = {"a": torch.tensor([1.0, 2.0]), "noise": torch.tensor([9.0, 0.0]), "b": torch.tensor([3.0, 4.0])}
    for largest, want in (
        (True, {"a": [False, False], "b": [True, True]}),
        (False, {"a": [True, True], "b": [False, False]}),
    ):
        selection = select(tensors, 0.5, largest=largest, exclude=["noise"])
        assert (selection.count, selection.num_ranked) == (2, 4)
        assert {n: m.tolist() for n, m in selection.masks()} == {**want, "noise": [False, False]}


def test_the_threshold_is_the_last_value_chosen():
    tensors = {"a": torch.tensor([1.0, 5.0, 2.0])}
    assert select(tensors, 2 / 3).threshold == 2.0
    assert select(tensors, 2 / 3, largest=False).threshold == 2.0
    assert np.isnan(select(tensors, 0).threshold)


def test_what_is_no_fisher_value_is_refused():
    for value in (-1.0, float("nan")):
        with pytest.raises(ArtefactError, match=rf"a Fisher value of w is {value}; expected"):
            select({"v": torch.ones(2), "w": torch.tensor([1.0, value])}, 0.5)
    for fraction in (-0.1, 1.1, float("nan")):
        with pytest.raises(DataError, match="expected a share of the parameters"):
            select({"v": torch.ones(2)}, fraction)


def test_a_tensor_that_is_not_there_is_refused():
    selection = select({"w": torch.arange(4.0)}, 0.5)
    with pytest.raises(ArtefactError, match="no tensor 'v'; expected the name of a parameter of the profile, as w"):
        selection.mask("v")
