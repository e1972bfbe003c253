"""What a Fisher is measured on, as the command line names it: a text or a labelled task → samples and facts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from guided_dropout.corpus import lm_samples
from guided_dropout.data.task_data import load_training_data
from guided_dropout.data.tasks import TASKS, Task
from guided_dropout.detection import detect_objective, has_lm_head
from guided_dropout.errors import DataError, ModelError
from guided_dropout.models import check_length
from guided_dropout.samples import Sample, accepted, vocabulary_size
from guided_dropout.texts import Text

ALL = "all"
# What is read of a text at most to draw samples from, unless told otherwise: some 40 seconds on two cores.
MAX_CHARACTERS = 200_000_000


@dataclass(frozen=True)
class Inputs:
    """Samples, the same each time they are gone over.

    Attributes:
        samples: any number of them.
        facts: what a profile should say of them.
        notes: what a person should know, a sentence each.
    """

    samples: Iterable[Sample]
    facts: dict[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> int | None:
        """How many samples there are, where that is known."""
        return len(self.samples) if isinstance(self.samples, Sized) else None


def number_of_samples(text: str) -> int | None:
    """A number, or None for ``all``.

    Raises:
        DataError: neither, or less than 1.
    """
    if text == ALL:
        return None
    if not text.isascii() or not text.removeprefix("-").isdigit() or int(text) < 1:
        raise DataError(f"number of samples {text}; expected at least 1, or {ALL}")
    return int(text)


def text_inputs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    *,
    num_samples: int | None,
    max_length: int,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> Inputs:
    """Samples of a text for a language model's own objective; see `corpus.lm_samples`."""
    check_length(model, max_length)
    kind = detect_objective(model, {"input_ids": list(range(1, 9))}).name
    samples = lm_samples(
        text,
        tokenizer,
        objective=kind,
        num_samples=num_samples,
        max_length=max_length,
        seed=seed,
        rows=vocabulary_size(model),
        progress=progress,
    )  # fmt: skip
    facts: dict[str, Any] = {"text": text.name, "seed": seed, "max_length": max_length}
    if num_samples is None:
        facts["taken"] = ALL
    notes = []
    if text.ignored:
        shown = ", ".join(text.ignored[:3]) + (", …" if len(text.ignored) > 3 else "")
        notes.append(f"{text.name}: {len(text.ignored):,} files that are no text left out ({shown})")
    if text.max_characters is not None and (text.cut or num_samples is None):
        facts["max_characters"] = text.max_characters
    if text.cut:
        notes.append(
            f"{text.name}: samples drawn from its first {text.max_characters:,} characters; --max-characters reads more"
        )
    if num_samples is not None and isinstance(samples, Sized) and len(samples) < num_samples:
        notes.append(
            f"{text.name} has {len(samples):,} samples of {max_length} tokens, fewer than {num_samples:,}: "
            "using them all"
        )
    return Inputs(samples, facts, tuple(notes))


def task_inputs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    data: str | None,
    columns: str | None = None,
    *,
    num_samples: int | None,
    max_length: int,
    seed: int,
) -> Inputs:
    """A labelled task's training examples for a classifier: drawn without replacement, or all in their order.

    Where the model names its classes as the task does, labels are matched by name; otherwise by index.

    Raises:
        DataError: no such task or data, the model has another number of classes, or a number is out of range.
        ModelError: the model is a language model.
    """
    from guided_dropout.data.encoding import encode

    if seed < 0:
        raise DataError(f"seed {seed}; expected 0 or more")
    if max_length < 4:
        raise DataError(f"max length {max_length}; expected at least 4 tokens")
    check_length(model, max_length)
    if has_lm_head(model):
        raise ModelError(
            f"{type(model).__name__} has no classes; expected a classifier fine-tuned on {task}, or a --text for a "
            "language model"
        )
    if task in TASKS:  # before the data are read
        _check_classes(model, TASKS[task])
    chosen, examples, notes = load_training_data(task, data, columns=columns)
    _check_classes(model, chosen)
    if num_samples is not None:
        drawn = np.random.default_rng([seed, 0]).permutation(len(examples)).tolist()
        examples = examples.take(drawn[:num_samples])
    order = _own_numbers(model, chosen)
    encoded, taken = encode(examples, chosen, tokenizer, max_length), accepted(model)
    samples = []
    for i in range(len(encoded)):
        # A BERT's tokenizer gives token types, which DistilBERT does not take.
        row = {name: value for name, value in encoded[i].items() if name in (*taken, "label") or not taken}
        label = row.pop("label")
        samples.append({**row, "labels": order[label] if order else label, "index": i})
    if num_samples is not None and len(samples) < num_samples:
        notes += (f"{task} has {len(samples):,} examples, fewer than {num_samples:,}: using them all",)
    facts = {"task": task, "data": examples.source, "seed": seed, "max_length": max_length}
    return Inputs(samples, facts | ({"taken": ALL} if num_samples is None else {}), notes)


def _own_numbers(model: PreTrainedModel, task: Task) -> list[int] | None:
    """The model's number of each class of the task, where it names them alike: exactly, else but for upper case."""
    own = {str(name): int(number) for number, name in (model.config.id2label or {}).items()}
    for spelled in (str, str.lower):
        numbers = {spelled(name): number for name, number in own.items()}
        names = [spelled(name) for name in task.labels or ()]
        if names and sorted(numbers) == sorted(names):
            return [numbers[name] for name in names]
    return None


def _check_classes(model: PreTrainedModel, task: Task) -> None:
    if model.config.num_labels != task.num_labels:
        raise DataError(
            f"{type(model).__name__} has {model.config.num_labels} classes; {task.name} has {task.num_labels}: "
            "expected a model fine-tuned on the task"
        )
