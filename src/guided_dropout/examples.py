"""Labelled texts: in memory, out of GLUE's tab-separated files, out of hub data sets; and random parts of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np

from guided_dropout.errors import DataError


@dataclass(frozen=True)
class Examples(Sequence[tuple[tuple[str, ...], float]]):
    """Labelled texts, in order.

    Attributes:
        texts: for each example its one or two strings.
        labels: for each example the index of its class, or for regression its score.
        source: where they come from, for people.
    """

    texts: Sequence[tuple[str, ...]]
    labels: Sequence[float]
    source: str = "memory"

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


@dataclass(frozen=True)
class GlueFiles:
    """Where a task's examples stand in GLUE's tab-separated files.

    Attributes:
        folder: name of the task's folder.
        texts: names of the text columns.
        label: name of the label column.
        columns: names of the columns of files without a header line; None where the first line names them.
        names: for each split its file.
    """

    folder: str
    texts: tuple[str, ...]
    label: str
    columns: tuple[str, ...] | None = None
    names: Mapping[str, str] = field(default_factory=lambda: {"train": "train.tsv", "validation": "dev.tsv"})


@dataclass(frozen=True)
class HubData:
    """Where a task's examples stand in a hub data set laid out like ``nyu-mll/glue``; labels are class indices there.

    Attributes:
        config: name of the data set's configuration.
        texts: names of the text columns; the label's is ``label``.
        splits: for each split its name there.
    """

    config: str
    texts: tuple[str, ...]
    splits: Mapping[str, str] = field(default_factory=lambda: {"train": "train", "validation": "validation"})


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


def read_glue_file(layout: GlueFiles, file: Path, labels: tuple[str, ...] | None) -> Examples:
    """Read one tab-separated file; quotation marks are text.

    Args:
        layout: its columns.
        file: the file, UTF-8.
        labels: names of the classes, None for regression. A class may be spelled by name or by index.

    Raises:
        DataError: not readable, or a malformed line, named by file and number.
    """
    try:
        # Not splitlines: the texts hold characters that Unicode calls line ends. utf-8-sig: MRPC may come with a mark.
        lines = file.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"cannot read {file} ({e}); expected UTF-8 text: download it again") from e
    columns = layout.columns or tuple(lines[0].split("\t"))
    first = 0 if layout.columns else 1
    for wanted in (*layout.texts, layout.label):
        if wanted not in columns:
            raise DataError(f"{file}:1: found columns {', '.join(columns)!r}; expected one named {wanted!r}")
    if lines[first:] in ([], [""]):
        raise DataError(f"{file}: found no examples; expected one a line: download it again")
    rows = [
        _parse_line(line, columns, layout, labels, f"{file}:{number}")
        for number, line in enumerate(lines[first:], start=first + 1)
    ]
    return Examples([text for text, _ in rows], [label for _, label in rows], str(file))


def _parse_line(
    line: str, columns: tuple[str, ...], layout: GlueFiles, labels: tuple[str, ...] | None, where: str
) -> tuple[tuple[str, ...], float]:
    cells = line.split("\t")
    if len(cells) != len(columns):
        raise DataError(f"{where}: found {len(cells)} fields; expected {len(columns)}: mend or remove the line")
    row = dict(zip(columns, cells, strict=True))
    return _texts([row[name] for name in layout.texts], where), _label(row[layout.label], labels, where)


def _texts(values: Sequence[Any], where: str) -> tuple[str, ...]:
    for value in values:
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{where}: found {value!r} for a text; expected words: mend or remove the example")
    return tuple(values)


def _label(value: Any, labels: tuple[str, ...] | None, where: str) -> float:
    if labels is None:
        return _score(value, where)
    if value in labels:
        return labels.index(value)
    if str(value) in map(str, range(len(labels))):
        return int(value)
    spelled = ", ".join(f"{i} ({name})" for i, name in enumerate(labels))
    raise DataError(f"{where}: found label {value!r}; expected one of {spelled}: mend or remove the example")


def _score(value: Any, where: str) -> float:
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise DataError(f"{where}: found label {value!r}; expected a number: mend or remove the example")
    return score


def read_hub_data(layout: HubData, repository: str, split: str, labels: tuple[str, ...] | None) -> Examples:
    """Read one split of a hub data set, or of a local folder laid out like one.

    Args:
        layout: its configuration, columns and splits.
        repository: ``owner/name`` or a folder.
        split: ``"train"``, ``"validation"``, …
        labels: names of the classes, None for regression.

    Raises:
        DataError: ``datasets`` is not installed, no such data set, or a label that is not in `labels`.
    """
    where = f"{repository}/{layout.config}/{layout.splits[split]}"
    columns = _hub_columns(layout, repository, layout.splits[split])
    rows = zip(*(columns[name] for name in layout.texts), strict=True)
    texts = [_texts(row, f"{where}[{i}]") for i, row in enumerate(rows)]
    if not texts:
        raise DataError(f"{where}: found no examples; expected a labelled split: choose another")
    return Examples(texts, [_label(v, labels, f"{where}[{i}]") for i, v in enumerate(columns["label"])], where)


def _hub_columns(layout: HubData, repository: str, split: str) -> dict[str, list[Any]]:
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ModuleNotFoundError as e:
        raise DataError(
            f"reading {repository} needs the `datasets` package: pip install 'guided-dropout[hub]', "
            "or give --data a GLUE folder"
        ) from e
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(repository, layout.config, split=split)
    except (OSError, ValueError, KeyError, DatasetsError) as e:
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0].rstrip(".")
        raise DataError(
            f"cannot read {layout.config}/{split} of {repository} ({reason}); expected a data set like nyu-mll/glue: "
            "check the name and the connection, or give --data a GLUE folder"
        ) from e
    finally:
        if shown:
            datasets.enable_progress_bars()
    wanted = (*layout.texts, "label")
    for name in wanted:
        if name not in table.column_names:
            raise DataError(
                f"{repository}/{layout.config} has columns {', '.join(table.column_names)}; expected one named {name!r}"
            )
    return {name: list(table[name]) for name in wanted}
