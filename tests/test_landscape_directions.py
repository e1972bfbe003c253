"""Directions and masks against slow, plain computations."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from families import classifier_of, language_model, profile_of
from hypothesis import example, given, settings
from hypothesis import strategies as st
from landscapes import drawn_profile
from torch import nn

from guided_dropout.errors import ArtefactError, DataError, ModelError
from guided_dropout.landscape import Direction, Mask, gaussian_direction, toward
from guided_dropout.landscape.directions import movable_parameters
from guided_dropout.landscape.masks import Masker


class One(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)


def slices(tensor):
    return list(tensor) if tensor.dim() > 1 else [tensor]


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 5),
)
def test_each_filter_is_as_long_as_that_of_the_weights(shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(dtype)
    if weight.dim() > 1:
        weight[0] = 0
    if not weight.any():
        return
    step = gaussian_direction(One(weight), seed=seed, vectors="moved").tensors["weight"]
    assert step.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for moved, kept in zip(slices(step), slices(weight), strict=True):
        assert moved.double().norm().item() == pytest.approx(kept.double().norm().item(), rel=1e-5)


def test_normalisations():
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.5]])
    drawn = gaussian_direction(One(weight), normalise="none").tensors["weight"]
    whole = gaussian_direction(One(weight), normalise="tensor").tensors["weight"]
    assert torch.allclose(whole, drawn * (weight.norm() / drawn.norm()))
    rows = gaussian_direction(One(weight)).tensors["weight"]
    assert torch.allclose(rows, drawn * (weight.norm(dim=1) / drawn.norm(dim=1))[:, None])
    many = gaussian_direction(One(torch.ones(300, 300)), normalise="none").tensors["weight"]
    assert many.mean().abs() < 0.02
    assert many.std() == pytest.approx(1, abs=0.02)


def test_a_direction_is_a_function_of_seed_axis_and_name_relative_to_the_backbone():
    lm, classifier = language_model("bert", seed=1), classifier_of("bert")
    a = gaussian_direction(lm, seed=3, normalise="none").tensors
    b = gaussian_direction(classifier, seed=3, normalise="none").tensors
    shared = [name for name in a if name in b]
    assert len(shared) > 10
    assert all(torch.equal(a[name], b[name]) for name in shared)
    others = [
        gaussian_direction(lm, seed=4, normalise="none"),
        gaussian_direction(lm, seed=3, axis=1, normalise="none"),
    ]
    for other in others:
        assert not any(torch.equal(a[name], other.tensors[name]) for name in a)
    pair = [a["bert.encoder.layer.0.output.dense.weight"], a["bert.encoder.layer.1.output.dense.weight"]]
    assert not torch.equal(*pair)


def test_vectors_are_held_unless_asked_for():
    model = language_model("bert")
    held, moved = gaussian_direction(model), gaussian_direction(model, vectors="moved")
    assert {t.dim() for t in held.tensors.values()} == {2}
    assert held.tensors.keys() < moved.tensors.keys() <= movable_parameters(model).keys()
    for name, p in model.named_parameters():
        if p.dim() == 1 and name in moved.tensors:
            assert moved.tensors[name].norm().item() == pytest.approx(p.norm().item(), rel=1e-5)


def test_tied_parameters_and_shared_memory_move_once():
    model = language_model("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    assert "lm_head.weight" not in gaussian_direction(model).tensors
    two = nn.Module()
    two.a = nn.Parameter(torch.ones(2, 2))
    two.b = nn.Parameter(two.a.data)
    assert list(gaussian_direction(two).tensors) == ["a"]


def test_length_and_number_moved():
    direction = Direction({"a": torch.tensor([[3.0, 0.0]]), "b": torch.tensor([4.0])})
    assert (direction.norm, direction.num_moved) == (5.0, 2)
    assert direction.scaled(2).norm == 10
    left = direction.masked({"a": torch.tensor([[True, True]])})
    assert (left.norm, list(left.tensors)) == (3.0, ["a"])


def test_saved_directions_come_back(tmp_path):
    made = gaussian_direction(language_model("gpt2"), seed=2)
    found = Direction.load(made.save(tmp_path / "d.safetensors"))
    assert found.facts == made.facts == {
        "kind": "gaussian", "seed": 2, "axis": 0, "normalise": "filter", "vectors": "held"
    }  # fmt: skip
    assert all(torch.equal(found.tensors[name], t) for name, t in made.tensors.items())
    profile_of(language_model("bert")).save_pretrained(tmp_path / "p")
    with pytest.raises(ArtefactError, match=r"holds 'fisher-profile'.*give a file that Direction.save wrote"):
        Direction.load(tmp_path / "p" / "fisher.safetensors")


def test_toward_another_model_arrives_there():
    start, end = language_model("bert", seed=0), classifier_of("bert", seed=1)
    step = toward(start, end)
    there = dict(end.named_parameters())
    name = "bert.encoder.layer.1.output.dense.weight"
    assert torch.allclose(start.get_parameter(name) + step.tensors[name], there[name], atol=1e-7)
    assert step.facts["left_out"]
    assert all(n.startswith("cls.") for n in step.facts["left_out"])
    with pytest.raises(ModelError, match=r"is missing in GPT2LMHeadModel; expected \[64, 16\] as in BertForMaskedLM"):
        toward(start, language_model("gpt2"))
    with pytest.raises(ModelError, match="moves no parameter"):
        toward(start, language_model("bert", seed=0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalise": "layer"}, "unknown normalisation 'layer'; expected one of: filter, tensor, none"),
        ({"vectors": "free"}, "unknown treatment of vectors 'free'"),
        ({"seed": -1}, "seed -1; expected 0 or more"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(DataError, match=message):
        gaussian_direction(One(torch.ones(2, 2)), **options)


# Masks


@pytest.fixture(scope="module")
def measured():
    """A model and a made-up profile of it, one tensor of which is noise."""
    model = language_model("bert")
    return model, drawn_profile(model, noise=("bert.encoder.layer.0.attention.self.key.weight",))


@pytest.mark.parametrize("kind", ["top", "bottom"])
@pytest.mark.parametrize("share", [0.5, 0.1, 0.0025])
def test_shares_are_those_of_the_sorted_values_that_can_move(measured, kind, share):
    model, profile = measured
    names = gaussian_direction(model).tensors
    masks = Masker(model, profile).masks(Mask(kind, share), names)
    ranked = [n for n in names if n not in profile.noise]
    values = torch.cat([profile.diagonal[n].flatten() for n in ranked])
    order = values.argsort(descending=kind == "top", stable=True)
    expected = torch.zeros(len(values), dtype=torch.bool)
    expected[order[: int(share * len(values) + 0.5)]] = True
    assert torch.equal(torch.cat([masks[n].flatten() for n in ranked]), expected)
    assert not any(masks[n].any() for n in profile.noise if n in masks)


def test_random_masks_are_as_large_as_top_ones_and_nested(measured):
    model, profile = measured
    names, masker = gaussian_direction(model).tensors, Masker(model, profile)

    def drawn(share, seed=0, kind="random"):
        masks = masker.masks(Mask(kind, share), names, seed=seed)
        return torch.cat([masks[n].flatten() for n in names if n in masks])

    assert drawn(0.1).sum() == drawn(0.1, kind="top").sum() == drawn(0.1, kind="bottom").sum()
    assert torch.equal(drawn(0.1) & drawn(0.4), drawn(0.1))
    assert not torch.equal(drawn(0.4), drawn(0.4, seed=1))
    overlap = (drawn(0.4) & drawn(0.4, kind="top")).sum() / drawn(0.4).sum()
    assert overlap == pytest.approx(0.4, abs=0.03)
    alone = Masker(model).masks(Mask("random", 0.25), names)
    assert sum(m.sum() for m in alone.values()) == round(0.25 * sum(t.numel() for t in names.values()))


def test_whole_tensors_are_chosen_as_published(measured):
    model, profile = measured
    names = gaussian_direction(model).tensors
    masks = Masker(model, profile, level="tensor").masks(Mask("top", 0.5), names)
    ranked = sorted((n for n in profile.tensor_means if n not in profile.noise), key=profile.tensor_means.get)
    chosen = ranked[::-1][: int(len(ranked) / 2 + 0.5)]
    assert {*masks} == {n for n in chosen if n in names}  # the vectors among them are chosen, and held
    assert all(m.all() for m in masks.values())
    assert len(masks) < len(chosen)


@pytest.mark.parametrize("text", ["all", "top:0.5", "bottom:0.0025", "random:1", "top:0.5="])
def test_masks_have_names(text):
    assert Mask.parse(text).name == text
    assert Mask.parse(text.rstrip("="), equal_norm=True).equal_norm == (text != "all")


@given(st.sampled_from(["top", "bottom", "random"]), st.floats(0, 1, exclude_min=True), st.booleans())
@example("top", 0.12345678, False)
@settings(deadline=None)
def test_a_masks_name_tells_it_from_any_other(kind, share, equal_norm):
    """By names a run that is resumed is known."""
    mask = Mask(kind, share, equal_norm)
    assert Mask.parse(mask.name) == mask
    assert Mask(kind, np.float64(share), equal_norm).name == mask.name


@pytest.mark.parametrize("text", ["top", "all:0.5", "top:0", "top:1.5", "top:half", "top:nan", "topp:0.5", ""])
def test_masks_that_are_none_are_told(text):
    with pytest.raises(DataError, match="expected"):
        Mask.parse(text)


def test_a_mask_needs_a_profile_of_the_model_with_values(measured):
    model, profile = measured
    names = gaussian_direction(model).tensors
    with pytest.raises(ArtefactError, match=r"mask top:0.5 without a Fisher profile; .*give --profile"):
        Masker(model).masks(Mask("top", 0.5), names)
    means = replace(profile, diagonal={}, shapes=profile.shapes)
    with pytest.raises(ArtefactError, match="masks of parameters need them"):
        Masker(model, means).masks(Mask("top", 0.5), names)
    assert Masker(model, means, level="tensor").masks(Mask("top", 0.5), names)
    with pytest.raises(ArtefactError, match="another model's"):
        Masker(language_model("gpt2"), profile)
    with pytest.raises(DataError, match=r"mask top:0.0001 leaves none of the [\d,]+ parameters"):
        Masker(model, profile).masks(
            Mask("top", 0.0001), {"bert.embeddings.position_embeddings.weight": torch.ones(32, 16)}
        )


def test_a_profile_serves_the_classifier_of_the_same_backbone(measured):
    _, profile = measured
    classifier = classifier_of("bert")
    names = gaussian_direction(classifier).tensors
    masks = Masker(classifier, profile).masks(Mask("top", 0.5), names)
    assert "classifier.weight" not in masks
    name = "bert.encoder.layer.1.output.dense.weight"
    assert 0 < masks[name].sum() < masks[name].numel()
