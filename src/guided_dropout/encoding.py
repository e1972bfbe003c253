"""Labelled examples as tokens, and the order in which a training reads them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from guided_dropout.errors import DataError
from guided_dropout.tables import HALF_CHARACTER
from guided_dropout.tasks import Examples, Task

TokenCache = dict[tuple[str, ...], dict[str, Any]]

# Batches whose examples are sorted by length together, at most: enough for little padding.
_BATCHES_TOGETHER = 16
# At least so many times are they sorted apart in an epoch, so that each epoch mixes them anew.
_STRETCHES = 3


class Encoded(Dataset[dict[str, Any]]):
    """Tokenised examples, which remember in what order they were read."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows
        self._read = hashlib.sha256()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._rows[index]
        self._read.update(repr((row["input_ids"], row["label"])).encode())
        return row

    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [len(row["input_ids"]) for row in self._rows]

    def by_length(self) -> Encoded:
        """The same examples, shortest first: batches in that order hold the least padding."""
        return Encoded(sorted(self._rows, key=lambda row: len(row["input_ids"])))

    def largest_id(self) -> int:
        """The largest token among all examples."""
        return max(max(row["input_ids"]) for row in self._rows)

    def digest(self) -> str:
        """Digest of the examples read so far (tokens and label), in the order in which they were read."""
        return self._read.hexdigest()[:16]


def encode(
    examples: Examples,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    cache: TokenCache | None = None,
) -> Encoded:
    """Tokenise examples, without padding.

    Args:
        examples: what is tokenised.
        task: says what the labels are.
        tokenizer: of the model.
        max_length: tokens at which a text is cut.
        cache: texts that were tokenised before, with the same tokenizer and length; new ones are added.

    Raises:
        DataError: no examples, not one text, or two, in each of them, or a label that the task does not have.
    """
    _check_examples(examples, task)
    cache = {} if cache is None else cache
    texts = [tuple(t) for t in examples.texts]
    new = [t for t in dict.fromkeys(texts) if t not in cache]
    if new:
        second = [t[1] for t in new] if len(new[0]) == 2 else None
        batch = tokenizer([t[0] for t in new], second, truncation=True, max_length=max_length)
        for i, text in enumerate(new):
            cache[text] = {name: batch[name][i] for name in batch}
    kind = float if task.is_regression else int
    return Encoded([{**cache[t], "label": kind(label)} for t, label in zip(texts, examples.labels, strict=True)])


def _check_examples(examples: Examples, task: Task) -> None:
    if not len(examples):
        raise DataError(f"{examples.source}: found no examples; expected at least one")
    sizes = {len(text) for text in examples.texts}
    if sizes not in ({1}, {2}):
        raise DataError(f"{examples.source}: found examples of {sorted(sizes)} texts; expected 1 or 2 in all of them")
    for text, label in examples:
        if not all(isinstance(part, str) and not HALF_CHARACTER.search(part) for part in text):
            raise DataError(f"{examples.source}: found the text {text!r}; expected strings of whole characters")
        try:
            finite = math.isfinite(label)
        except TypeError:
            finite = False
        if not finite or (not task.is_regression and label not in range(task.num_labels)):
            wanted = "a finite number" if task.is_regression else f"a class index below {task.num_labels}"
            raise DataError(f"{examples.source}: found the label {label!r}; expected {wanted}, as {task.name} has")


def order_name(examples: int, batch_size: int) -> str:
    """What a recipe says of the order of so many examples."""
    together = _together(examples, batch_size)
    return "batches of like lengths" + ("" if together == _BATCHES_TOGETHER else f", sorted {together} at a time")


def _together(examples: int, batch_size: int) -> int:
    return max(1, min(_BATCHES_TOGETHER, examples // (_STRETCHES * batch_size)))


class LengthGroups(Sampler[int]):
    """Each epoch another random order, in which the examples of a batch are of like lengths, so that little is padding.

    A random permutation is cut into stretches of 16 batches, or of fewer, so that there are three stretches at least
    (of one batch at least); each is sorted by length and cut into batches, and all batches are shuffled. Each example
    comes once an epoch.

    Args:
        lengths: tokens of each example.
        batch_size: examples of a batch.
        seed: of all epochs.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int):
        self._lengths = torch.as_tensor(lengths)
        self._batch_size = batch_size
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        size = self._batch_size
        order = torch.randperm(len(self), generator=self._generator)
        stretches = order.split(size * _together(len(self), size))
        batches = [b for s in stretches for b in s[self._lengths[s].argsort(descending=True, stable=True)].split(size)]
        # The one that is not full, if any, stays last: the batches are cut anew from this sequence.
        full = len(self) // size
        shuffled = torch.randperm(full, generator=self._generator).tolist()
        for b in (*shuffled, *range(full, len(batches))):
            yield from batches[b].tolist()
