"""Variants of a sample, on which a model is run to see what it does: short, turned round, longer, all to be guessed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from guided_dropout.objectives import IGNORE, PER_SAMPLE, Objective, Sample, has_target

# What a model does with a token it does in the same way with any; the time that it takes does depend on their number.
SHORT = 16


def sequences(sample: Sample) -> dict[str, Tensor]:
    """What a sample holds for each of its tokens; not its index, nor a single label."""
    return {k: t for k, v in sample.items() if (t := torch.as_tensor(v)).dim()}


def shortened(objective: Objective, sample: Sample, length: int = SHORT) -> dict[str, Any]:
    """The beginning and the end of a sample, `length` tokens at most and at least one fewer than it has.

    Of a decoder's tokens as many. The end stays since some classifiers read an end-of-text token; masked tokens go. One
    of the remaining tokens has a target.
    """
    parts = sequences(sample)
    chosen = _ends(parts.get("attention_mask", torch.ones_like(parts["input_ids"])).nonzero()[:, 0], length)
    short = {**sample, **{k: v[chosen] for k, v in parts.items() if len(v) == len(parts["input_ids"])}}
    labels = parts.get("labels")
    if labels is None:
        return short
    if objective.name == "seq2seq" and len(labels) != len(parts["input_ids"]):
        chosen = _ends(torch.arange(len(labels)), length)
        short |= {k: v[chosen] for k, v in parts.items() if len(v) == len(labels)}
    if not has_target(objective, short):
        short["labels"] = short["labels"].clone()
        short["labels"][-1] = labels.max()
    return short


def _ends(numbers: Tensor, length: int) -> Tensor:
    """The first and the last of some numbers."""
    kept = max(2, min(length, len(numbers) - 1))
    if kept >= len(numbers):
        return numbers
    return torch.cat([numbers[: kept - kept // 2], numbers[-(kept // 2) :]])


def with_all_targets(sample: Sample) -> Sample:
    """The same with something to be guessed at each position."""
    labels = torch.as_tensor(sample["labels"])
    if labels.dim() == 0:
        return sample
    return {**sample, "labels": labels.where(labels != IGNORE, labels.max())}


def with_more_targets(sample: Sample) -> Sample:
    """The same with something to be guessed at each second position at least."""
    labels = torch.as_tensor(sample["labels"])
    if labels.dim() == 0:
        return sample
    second = torch.arange(len(labels), device=labels.device) % 2 == 1
    return {**sample, "labels": labels.where((labels != IGNORE) | ~second, labels.max())}


def turned(sample: Sample) -> dict[str, Any]:
    """Another sample of the same form: its tokens in the opposite order."""
    return {**sample, **{k: v.flip(0) for k, v in sequences(sample).items() if k in ("input_ids", "labels")}}


def altered(model: nn.Module, sample: Sample) -> dict[str, Any]:
    """Another sample of the same form, with other tokens."""
    other, ids = turned(sample), torch.as_tensor(sample["input_ids"])
    if torch.equal(other["input_ids"], ids):
        other["input_ids"] = (ids + 1) % model.get_input_embeddings().weight.shape[0]  # pyright: ignore
    return other


def longer(sample: Sample) -> dict[str, Any]:
    """Another sample, one place longer: a token twice that is no end of text."""
    return {**sample, **{k: torch.cat([v[: len(v) // 2 + 1], v[len(v) // 2 :]]) for k, v in sequences(sample).items()}}


def pair_with_all_targets(objective: Objective, sample: Sample, *, equal: bool) -> list[Sample]:
    """A sample and its turned variant, with a target at each position; the latter shorter unless they should be equal.

    Those with a single label are always equally long: some classifiers want as many end-of-text tokens in each.
    """
    pair = [with_all_targets(s) for s in (sample, turned(sample))]
    if not equal and objective.name not in PER_SAMPLE:
        pair[1] = shortened(objective, pair[1], len(pair[1]["input_ids"]) - 3)
    return pair
