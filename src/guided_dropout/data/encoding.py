"""Labelled examples as tokens, which remember in what order a training reads them."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from guided_dropout.data.tables import HALF_CHARACTER
from guided_dropout.data.tasks import Examples, Task
from guided_dropout.errors import DataError

TokenCache = dict[tuple[str, ...], dict[str, Any]]


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

    def by_length(self) -> Encoded:
        """The same examples, shortest first: batches in that order hold the least padding."""
        return Encoded(sorted(self._rows, key=lambda row: len(row["input_ids"])))

    def tokens(self) -> set[int]:
        """Each token that occurs."""
        return {token for row in self._rows for token in row["input_ids"]}

    def sample(self) -> dict[str, Tensor]:
        """A model's inputs for a longest example alone, [1, T] each, without its label."""
        longest = max(self._rows, key=lambda row: len(row["input_ids"]))
        return {name: torch.tensor([value]) for name, value in longest.items() if name != "label"}

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
