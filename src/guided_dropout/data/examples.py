"""Labelled texts: in memory, out of GLUE's tab-separated files and out of its hub data set; random parts of them."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np

from guided_dropout.data.columns import class_name
from guided_dropout.data.hub_tables import read_hub_table
from guided_dropout.data.tables import Table, read_tsv, table_kind
from guided_dropout.errors import DataError


@dataclass(frozen=True)
class Examples(Sequence[tuple[tuple[str, ...], float]]):
    """Labelled texts, in order.

    Attributes:
        texts: for each example its one or two strings.
        labels: for each example the index of its class, or for regression its score.
        source: where they come from, for people.
        notes: what a person should know of how they were read, a sentence each; parts of them have none.
    """

    texts: Sequence[tuple[str, ...]]
    labels: Sequence[float]
    source: str = "memory"
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.labels):
            raise DataError(
                f"{self.source}: {len(self.texts)} texts and {len(self.labels)} labels; expected a label for each text"
            )

    def __len__(self) -> int:
        return len(self.texts)

    @overload
    def __getitem__(self, index: int) -> tuple[tuple[str, ...], float]: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> tuple[tuple[str, ...], float] | Examples:
        if isinstance(index, slice):
            return Examples(self.texts[index], self.labels[index], self.source)
        return self.texts[index], self.labels[index]

    def __iter__(self) -> Iterator[tuple[tuple[str, ...], float]]:
        return iter(zip(self.texts, self.labels, strict=True))

    def take(self, indices: Sequence[int]) -> Examples:
        """The examples at `indices`, in that order."""
        return Examples([self.texts[i] for i in indices], [self.labels[i] for i in indices], self.source)

    def digest(self) -> str:
        """Digest of the texts and labels, in their order."""
        digest = hashlib.sha256()
        for text, label in self:
            digest.update(repr((tuple(text), float(label))).encode())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class GlueFiles:
    """Where a task's examples stand in GLUE's tab-separated files.

    Attributes:
        folder: name of the task's folder.
        texts: names of the text columns.
        label: name of the label column.
        columns: names of the columns of files without a header line; None where the first line names them.
        names: for each split its file.
        broken: splits whose file was published with lines of another number of fields, which are left out and counted.
    """

    folder: str
    texts: tuple[str, ...]
    label: str
    columns: tuple[str, ...] | None = None
    names: Mapping[str, str] = field(default_factory=lambda: {"train": "train.tsv", "validation": "dev.tsv"})
    broken: tuple[str, ...] = ()


@dataclass(frozen=True)
class HubData:
    """Where a task's examples stand in a hub data set laid out like ``nyu-mll/glue``; labels are class indices there.

    Attributes:
        config: name of the data set's configuration.
        texts: names of the text columns.
        splits: for each split its name there.
        label: name of the label column.
    """

    config: str
    texts: tuple[str, ...]
    splits: Mapping[str, str] = field(default_factory=lambda: {"train": "train", "validation": "validation"})
    label: str = "label"


def subset(examples: Examples, fraction: float, seed: int) -> Examples:
    """A random part of `examples`: the first ``round(fraction · N)`` (at least 1) of a permutation drawn by `seed`.

    With the same seed a smaller part is contained in every larger one.

    Raises:
        DataError: `fraction` is not in (0, 1].
    """
    if not 0.0 < fraction <= 1.0:
        raise DataError(f"a train fraction of {fraction}; expected more than 0 and at most 1")
    order = np.random.default_rng(seed).permutation(len(examples)).tolist()
    return examples.take(order[: max(1, round(fraction * len(examples)))])


def hold_out(examples: Examples, share: float, seed: int) -> tuple[Examples, Examples]:
    """Deal `examples` into two parts by chance, the second with ``round(share · N)`` of them, none of them empty.

    A function of the number of examples, `share` and `seed` alone, and independent of what `subset` draws by the same
    seed.

    Raises:
        DataError: `share` is not in (0, 1), or there are less than two examples.
    """
    if not 0.0 < share < 1.0:
        raise DataError(f"a share of {share} to hold out; expected more than 0 and less than 1")
    n = len(examples)
    if n < 2:
        raise DataError(f"{examples.source}: found {n} examples; expected at least two to hold some out")
    (child,) = np.random.SeedSequence(seed).spawn(1)
    order = np.random.default_rng(child).permutation(n).tolist()
    held = min(max(1, round(share * n)), n - 1)
    return examples.take(order[held:]), examples.take(order[:held])


def pool(parts: Sequence[Examples]) -> Examples:
    """All examples of several, one after the other."""
    texts = [text for part in parts for text in part.texts]
    return Examples(texts, [label for part in parts for label in part.labels], " + ".join(p.source for p in parts))


def _known_as(table: Table) -> str:
    """A path without the folders that mean nothing elsewhere, however it was spelled; a hub data set by its name."""
    is_file = table.by_line or table_kind(table.source) is not None
    if is_file or Path(table.source).is_absolute():
        return "/".join(Path(os.path.abspath(table.source)).parts[-2:])
    return table.source


def to_examples(
    table: Table,
    texts: Sequence[str],
    label: str,
    read: Callable[[Any, str], float],
    *,
    advice: str = "check it",
    empty_second: bool = False,
) -> Examples:
    """A table's rows as examples.

    Args:
        table: holds the columns.
        texts: names of the text columns.
        label: name of the label's column.
        read: a label and its place → class index or score.
        advice: what to do about a table without rows.
        empty_second: whether the second of two texts may be empty.

    Raises:
        DataError: no rows, a text that is none, or what `read` raises.
    """
    if not len(table):
        raise DataError(f"{table.source}: found no examples; expected at least one: {advice}")
    rows = enumerate(zip(*(table.columns[name] for name in texts), strict=True))
    return Examples(
        [_texts(row, table.where(i), empty_second=empty_second) for i, row in rows],
        [read(value, table.where(i)) for i, value in enumerate(table.columns[label])],
        _known_as(table),
        (f"{table.source}: lines of another number of fields left out: {table.left_out:,}",) if table.left_out else (),
    )


def label_reader(labels: tuple[str, ...] | None) -> Callable[[Any, str], float]:
    """Reads a label, given with its place: a class by name or index, or a score where `labels` is None."""
    if labels is None:
        return _score
    indices = {name: i for i, name in enumerate(labels)}
    numbers = {str(i): i for i in range(len(labels))}
    spelled = ", ".join(f"{i} ({name})" for i, name in enumerate(labels[:10])) + (", …" if len(labels) > 10 else "")

    def read(value: Any, where: str) -> int:
        name = class_name(value, where)
        index = indices.get(value, indices.get(name)) if isinstance(value, str) else None
        index = numbers.get(name) if index is None else index
        if index is None:
            raise DataError(f"{where}: found label {value!r}; expected one of {spelled}: mend or remove the example")
        return index

    return read


def _texts(values: Sequence[Any], where: str, *, empty_second: bool) -> tuple[str, ...]:
    for i, value in enumerate(values):
        if not isinstance(value, str) or not (value.strip() or (empty_second and i)):
            raise DataError(f"{where}: found {value!r} for a text; expected words: mend or remove the example")
    return tuple(values)


def _score(value: Any, where: str) -> float:
    try:
        score = float(value)
    except (TypeError, ValueError, OverflowError):
        score = math.nan
    if not math.isfinite(score):
        raise DataError(f"{where}: found label {repr(value)[:40]}; expected a number: mend or remove the example")
    return score


def find_glue_file(layout: GlueFiles, folder: Path, split: str) -> Path | None:
    """The file of `split` in GLUE's folder or in the task's own; None where `folder` is neither.

    Raises:
        DataError: the task's folder is there, the file is not.
    """
    own = folder / layout.folder
    file = (own if own.is_dir() else folder) / layout.names[split]
    if own.is_dir() and not file.is_file():
        raise DataError(f"no {file.name} in {own}, which holds {listing(own)}; expected the split's file: add it")
    return file if file.is_file() else None


def listing(folder: Path) -> str:
    """What stands in `folder`, in a few words."""
    names = sorted(p.name for p in folder.iterdir())
    rest = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + rest if names else "nothing"


def read_glue_file(
    layout: GlueFiles, file: Path, labels: tuple[str, ...] | None, *, split: str, empty_second: bool = False
) -> Examples:
    """Read one of GLUE's tab-separated files; quotation marks are text.

    Args:
        layout: its columns.
        file: the file, UTF-8.
        labels: names of the classes, None for regression. A class may be spelled by name or by index.
        split: which split it is.
        empty_second: whether the second of two texts may be empty.

    Raises:
        DataError: not readable, or a malformed line, named by file and number.
    """
    advice = "download it again"
    table = read_tsv(
        file,
        (*layout.texts, layout.label),
        layout.columns,
        advice=advice,
        broken_lines=split in layout.broken,
    )
    return to_examples(
        table, layout.texts, layout.label, label_reader(labels), advice=advice, empty_second=empty_second
    )


def read_hub_data(
    layout: HubData, repository: str, split: str, labels: tuple[str, ...] | None, *, empty_second: bool = False
) -> Examples:
    """Read one split of a hub data set, or of a local folder laid out like one.

    Args:
        layout: its configuration, columns and splits.
        repository: ``owner/name`` or a folder.
        split: ``"train"``, ``"validation"``, …
        labels: names of the classes, None for regression.
        empty_second: whether the second of two texts may be empty.

    Raises:
        DataError: ``datasets`` is not installed, no such data set, or a label that is not in `labels`.
    """
    advice = "give a data set laid out like nyu-mll/glue"
    table = read_hub_table(
        repository, layout.config, layout.splits[split], (*layout.texts, layout.label), advice=advice
    )
    return to_examples(
        table, layout.texts, layout.label, label_reader(labels), advice=advice, empty_second=empty_second
    )
