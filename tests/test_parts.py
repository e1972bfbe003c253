"""A batch in parts of like lengths: each example once, the whole batch's gradient, no cheaper way to cut."""

import itertools

import pytest
import torch
from families import VOCAB, classifier_of
from hypothesis import given
from hypothesis import strategies as st

from guided_dropout.parts import parts_of_like_lengths


def batch_of(lengths, seed=0, left=False):
    """Padded examples whose first token is their number."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(3, VOCAB, mask.shape, generator=generator) * mask
    ids[:, 0] = 3 + torch.arange(len(lengths))
    batch = {"input_ids": ids, "attention_mask": mask}
    if left:
        batch = {name: value.flip(1) for name, value in batch.items()}
    return {**batch, "labels": torch.randint(0, 2, (len(lengths),), generator=generator)}


def cost(groups, overhead):
    return sum(len(g) * max(g) + overhead for g in groups)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(0, 200))
def test_each_example_is_in_one_part_without_its_padding(lengths, overhead):
    batch = batch_of(lengths)
    batch["kind"] = "as it is"
    found = []
    for part, share in parts_of_like_lengths(batch, overhead):
        assert part["kind"] == "as it is"
        assert share == pytest.approx(len(part["labels"]) / len(lengths))
        assert part["input_ids"].shape == part["attention_mask"].shape
        assert part["attention_mask"][-1].all()
        for ids, mask, label in zip(part["input_ids"], part["attention_mask"], part["labels"], strict=True):
            found.append((ids[mask.bool()].tolist(), int(label)))
    rows = zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
    assert sorted(found) == sorted((ids[mask.bool()].tolist(), int(label)) for ids, mask, label in rows)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(0, 60))
def test_no_other_way_to_cut_is_cheaper(lengths, overhead):
    ordered = sorted(lengths)
    best = min(
        cost([ordered[a:b] for a, b in itertools.pairwise((0, *cuts, len(ordered)))], overhead)
        for k in range(len(ordered))
        for cuts in itertools.combinations(range(1, len(ordered)), k)
    )
    parts = parts_of_like_lengths(batch_of(lengths), overhead)
    assert cost([part["attention_mask"].sum(1).tolist() for part, _ in parts], overhead) == best


@pytest.mark.parametrize("labels", [2, 1])
@pytest.mark.parametrize("family", ["bert", "deberta-v2", "gpt2", "llama", "t5"])
def test_parts_have_the_gradient_of_the_whole(family, labels):
    model = classifier_of(family, num_labels=labels).double()
    batch = batch_of([3, 21, 4, 9, 20, 3, 8])
    if family == "t5":  # reads the class off the end of a text
        batch["input_ids"][torch.arange(7), batch["attention_mask"].sum(1) - 1] = 2
    if labels == 1:
        batch["labels"] = batch["labels"].double()
    wanted = torch.autograd.grad(model(**batch).loss, list(model.parameters()), allow_unused=True)
    parts = list(parts_of_like_lengths(batch, 10))
    assert len(parts) > 2
    for part, share in parts:
        (share * model(**part).loss).backward()
    for (name, parameter), gradient in zip(model.named_parameters(), wanted, strict=True):
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-8, atol=1e-12, msg=name)


WITH_A_HOLE = {"input_ids": torch.ones(2, 3), "attention_mask": torch.tensor([[1, 0, 1], [1, 1, 1]])}


@pytest.mark.parametrize("batch", [batch_of([2, 40], left=True), {"input_ids": torch.ones(2, 40)}, WITH_A_HOLE])
def test_padding_on_the_left_within_or_unknown_stays(batch):
    ((part, share),) = parts_of_like_lengths(batch, 0)
    assert share == 1
    assert all(part[name] is batch[name] for name in batch)
