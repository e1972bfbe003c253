"""The samples as they come → batches of like lengths, in an order that is always the same and in constant memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from guided_dropout.fisher.lengths import predicts_from_padding
from guided_dropout.objectives import Objective, Sample, has_target

# Batches' worth of samples that are read ahead and sorted by length: padding falls with it, host memory grows with it.
LOOK_AHEAD = 64
# More samples than this in a batch gain nothing, and their float32 sums would lose digits.
MOST_SAMPLES = 512


@dataclass(frozen=True)
class Item:
    """A sample on its way.

    Attributes:
        index: its place in the caller's stream, from 0.
        sample: the sample.
        lengths: tokens of its input and, for sequence to sequence models, of the decoder's; otherwise 0.
        unpadded: whether it may share a batch with samples of its own lengths only.
    """

    index: int
    sample: Sample
    lengths: tuple[int, int]
    unpadded: bool = False


class Stream:
    """One process's share of the samples, without those that have no target.

    Args:
        objective: decides what a target is.
        samples: those of all processes.
        process: of the `processes` that share the samples out by index, the one whose share this is.
        processes: how many there are.
        unpadded: whether no sample may be padded (see `lengths.goes_by_longest`).

    Attributes:
        skipped: how many of the share had no target so far.
    """

    def __init__(
        self,
        objective: Objective,
        samples: Iterable[Sample],
        *,
        process: int = 0,
        processes: int = 1,
        unpadded: bool = False,
    ):
        self._objective, self._samples, self._unpadded = objective, samples, unpadded
        self._process, self._processes = process, processes
        self.skipped = 0

    def __iter__(self) -> Iterator[Item]:
        for index, sample in enumerate(self._samples):
            if index % self._processes != self._process:
                continue
            if has_target(self._objective, sample):
                unpadded = self._unpadded or predicts_from_padding(self._objective, sample)
                yield Item(index, sample, self._lengths(sample), unpadded)
            else:
                self.skipped += 1

    def _lengths(self, sample: Sample) -> tuple[int, int]:
        decoded = 0
        if self._objective.name == "seq2seq":
            decoded = len(sample["decoder_input_ids"] if "decoder_input_ids" in sample else sample["labels"])
        return len(sample["input_ids"]), decoded


def batches(
    items: Iterable[Item],
    *,
    batch_size: int = 8,
    tokens_per_batch: int | None = None,
    in_order: bool = False,
) -> Iterator[list[Item]]:
    """Group samples of like lengths, window by window, or cut the stream as it comes.

    The order is a function of the lengths alone. Within a window the longest samples come first, so that memory runs
    out at once or never; the other batches follow in the order of their earliest sample, so that lengths are mixed.

    Args:
        items: samples in the order of their index; read as far ahead as `LOOK_AHEAD` batches.
        batch_size: samples per batch, where `tokens_per_batch` is None.
        tokens_per_batch: the most that a batch may hold, padding counted: samples × (longest input + longest decoder
            input). A sample that is longer runs alone.
        in_order: keep the samples' own order, with more padding: a batch ends where the next sample has no place in it.
    """
    most = min(batch_size if tokens_per_batch is None else MOST_SAMPLES, MOST_SAMPLES)
    budget = tokens_per_batch or math.inf
    if in_order:
        yield from _cut(items, most, budget)
        return
    for window in _windows(items, LOOK_AHEAD * most, LOOK_AHEAD * budget):
        window.sort(key=_by_length, reverse=True)
        longest, *others = _cut(window, most, budget)
        yield longest
        yield from sorted(others, key=lambda batch: min(item.index for item in batch))


def _windows(items: Iterable[Item], most: int, budget: float) -> Iterator[list[Item]]:
    window: list[Item] = []
    tokens = 0
    for item in items:
        window.append(item)
        tokens += sum(item.lengths)
        if len(window) >= most or tokens >= budget:
            yield window
            window, tokens = [], 0
    if window:
        yield window


def _by_length(item: Item) -> tuple[int, int]:
    """Two lengths cannot both be sorted by: inputs within a twelfth of each other go by the decoder's."""
    source, target = item.lengths
    return (round(8 * math.log2(source)), target) if target else (source, 0)


def _cut(items: Iterable[Item], most: int, budget: float) -> Iterator[list[Item]]:
    batch: list[Item] = []
    longest = (0, 0)
    for item in items:
        padded = (max(longest[0], item.lengths[0]), max(longest[1], item.lengths[1]))
        strict = any(i.unpadded for i in (item, *batch)) and any(i.lengths != item.lengths for i in batch)
        if batch and (strict or (len(batch) + 1) * sum(padded) > budget):
            yield batch
            batch, padded = [], item.lengths
        batch.append(item)
        longest = padded
        if len(batch) == most:  # without a look at the next one
            yield batch
            batch, longest = [], (0, 0)
    if batch:
        yield batch
