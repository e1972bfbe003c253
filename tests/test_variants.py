"""What becomes of a sample on which a model is only looked at."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from guided_dropout.fisher.variants import SHORT, longer, pair_with_all_targets, shortened
from guided_dropout.objectives import IGNORE, Objective, has_target


@given(
    name=st.sampled_from(["mlm", "causal", "seq2seq"]),
    inputs=st.integers(2, 200),
    outputs=st.integers(2, 200),
    target=st.integers(0, 199),
    masked=st.integers(0, 190),
    length=st.integers(0, 220),
)
def test_a_short_sample_is_the_ends_of_a_long_one_and_has_a_target(name, inputs, outputs, target, masked, length):
    objective, outputs = Objective(name), outputs if name == "seq2seq" else inputs
    labels = torch.full((outputs,), IGNORE)
    labels[max(target % outputs, name == "causal")] = 7
    mask = torch.ones(inputs, dtype=torch.long)
    mask[max(2, inputs - masked) :] = 0
    sample = {"input_ids": torch.arange(inputs), "attention_mask": mask, "labels": labels, "index": 3}
    short = shortened(objective, sample, length)
    seen = int(mask.sum())
    kept = short["input_ids"].tolist()
    assert len(kept) <= max(2, min(length, seen - 1))
    assert kept[0] == 0
    assert kept[-1] == seen - 1
    assert kept == sorted(kept)
    assert short["attention_mask"].all()
    assert short["index"] == 3
    assert has_target(objective, short)
    assert len(short["labels"]) <= max(2, min(length, outputs - 1))
    assert len(sample["input_ids"]) == inputs


def test_a_longer_one_has_no_other_end():
    sample = {"input_ids": torch.tensor([1, 8, 9, 2]), "labels": torch.tensor([-100, 8, -100, 2]), "index": 1}
    more = longer(sample)
    assert more["input_ids"].tolist() == [1, 8, 9, 9, 2]
    assert more["labels"].tolist() == [-100, 8, -100, -100, 2]


def test_a_single_label_stays():
    sample = {"input_ids": torch.arange(100), "labels": torch.tensor(2)}
    short = shortened(Objective("classification"), sample)
    assert (len(short["input_ids"]), short["labels"]) == (SHORT, torch.tensor(2))


@pytest.mark.parametrize("equal", [True, False])
def test_a_pair_has_targets_everywhere(equal):
    ids = torch.arange(10)
    one, two = pair_with_all_targets(
        Objective("mlm"), {"input_ids": ids, "labels": ids.where(ids == 4, IGNORE)}, equal=equal
    )
    assert one["input_ids"].tolist() == [*range(10)]
    assert two["input_ids"].tolist() == ([*range(9, -1, -1)] if equal else [9, 8, 7, 6, 2, 1, 0])
    assert all((s["labels"] == 4).all() for s in (one, two))
