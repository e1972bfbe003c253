"""What a run is trained and evaluated on: a GLUE task, files of one's own or a hub data set, and how they are split."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from guided_dropout.data.columns import Columns, class_reader, find_classes, missing_labels
from guided_dropout.data.examples import Examples, hold_out, label_reader, pool, to_examples
from guided_dropout.data.hub_tables import hub_split_names, read_hub_table
from guided_dropout.data.tables import KINDS, Table, read_table, table_files, table_kind
from guided_dropout.data.tasks import TASKS, Task, get_task, load_task
from guided_dropout.errors import DataError, unknown

GLUE, PAPER, HOLDOUT = "glue", "paper", "holdout"
_PAPER_SHARE = 0.2
_PLAIN = Columns(("text",), "label")


@dataclass(frozen=True)
class DataSource:
    """Where labelled data are and how they are read and split, as plain data: what `load_data` takes beside a task."""

    data: str | None = None
    eval_data: str | None = None
    columns: str | None = None
    metrics: str = ""
    hub_splits: str = ""
    split: str = GLUE

    @property
    def is_one_task(self) -> bool:
        """Whether the data are files of one's own, which are one task, with any name."""
        return self.data is not None and bool(table_kind(self.data))

    def task_name(self, task: str) -> str:
        """The name of a task with these data.

        Raises:
            DataError: there is none such.
        """
        return task if self.is_one_task or "/" in task else get_task(task).name


@dataclass(frozen=True)
class TaskData:
    """A task with its examples, as `load_data` gives them.

    Attributes:
        task: what is predicted, with the classes that were found.
        train: all training examples.
        validation: the examples that are evaluated after each epoch.
        more: further evaluation splits by name, such as MNLI's ``"mismatched"``.
        split: how they were split; see `load_data`.
        notes: what a person should know, a sentence each.

    Raises:
        DataError: some examples have one text and others two, or those that a regression is evaluated on one score.
    """

    task: Task
    train: Examples
    validation: Examples
    more: Mapping[str, Examples] = field(default_factory=dict)
    split: str = GLUE
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        first: tuple[int, str] | None = None
        for name, examples in {"training": self.train, "evaluation": self.validation, **self.more}.items():
            for number in sorted({len(text) for text in examples.texts}):
                here = number, f"{name} examples of {number} ({examples.source})"
                first = first or here
                if number != first[0]:
                    raise DataError(f"{self.task.name}: {first[1]} and {here[1]} texts; expected 1 or 2 in all of them")
        for examples in (self.validation, *self.more.values()):
            _check_scores(self.task, examples)


@dataclass(frozen=True)
class _Read:
    """What was read, before it is split."""

    task: Task
    train: Examples
    validation: Examples | None
    more: Mapping[str, Examples] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Asked:
    """What was asked for, beside the task and the data."""

    eval_data: str | Path | None
    columns: Columns | None
    metrics: tuple[str, ...]
    hub_splits: tuple[str, ...]

    def refuse(self, what: str, *names: str) -> None:
        """Make sure that these were not asked for."""
        for name in names:
            if value := getattr(self, name):
                shown = ",".join(value) if isinstance(value, tuple) else value
                raise DataError(f"found --{name.replace('_', '-')} {shown} with {what}; expected none: leave it out")


def load_data(
    task: Task | str | None,
    data: str | Path | tuple[Examples, Examples] | TaskData | None = None,
    *,
    eval_data: str | Path | None = None,
    columns: Columns | str | None = None,
    metrics: Sequence[str] | str = (),
    hub_splits: Sequence[str] | str = (),
    split: str = GLUE,
    seed: int = 0,
) -> TaskData:
    """Read what a run is trained and evaluated on.

    - A task of `tasks.TASKS` (or one with files of its own): from a GLUE folder, a data set folder or the hub; see
      `tasks.load_task`.
    - Files of one's own: `data` ends with ``.csv``, ``.tsv``, ``.jsonl`` or ``.parquet``. `task` is a name for it, the
      file's by default; or a known task, whose classes and metrics are then used.
    - A hub data set: `task` is ``"owner/name"`` or ``"owner/name:config"``, or a folder laid out like one.

    Classes of files and hub data sets are those of the training data, sorted (integers by value), or the data set's own
    where it names them.

    Args:
        task: see above.
        data: likewise; or a pair (train, validation) of examples.
        eval_data: file with the evaluation examples, for files of one's own.
        columns: where texts and label stand in files and hub data sets; see `Columns.parse`. By default ``text`` and
            ``label``.
        metrics: names in `tasks.METRICS`, as a sequence or with commas between, the main one first; by default
            accuracy, with Matthews correlation for two classes, or Pearson and Spearman correlation for a regression.
            F1 is that of the second class.
        hub_splits: a hub data set's splits to train and evaluate on, and any further ones to evaluate; by default
            ``train``, and ``validation``, or ``test`` where there is none.
        split: ``"glue"``: as they come, for GLUE the official dev split. ``"paper"``: training and evaluation examples
            pooled and dealt anew, 80 % for training (further evaluation splits stay). ``"holdout:0.2"``: that share of
            the training examples is held out for evaluation, and no evaluation split is read.
        seed: deals them; a run gives ``Seeds.subset``.

    Raises:
        DataError: something is missing, malformed, or does not go together.
    """
    kind, share = parse_split(split)
    asked = _Asked(
        eval_data,
        Columns.parse(columns) if isinstance(columns, str) else columns,
        _names(metrics, "--metrics"),
        _names(hub_splits, "--hub-splits"),
    )
    if isinstance(data, TaskData):
        asked.refuse("data that were loaded before", "eval_data", "columns", "metrics", "hub_splits")
        name = task.name if isinstance(task, Task) else task
        if name not in (None, data.task.name):
            raise DataError(f"the task {name} with loaded data of {data.task.name}; expected that task: leave it out")
        if kind != GLUE:
            raise DataError(f"found --split {split} with data that were loaded before; expected it when loading them")
        return data
    read = _read(task, data, asked, evaluated=kind != HOLDOUT)
    if read.validation is not None:
        _check_scores(read.task, read.validation)  # before it is pooled with other examples
    train, validation = _dealt(read, kind, share, seed)
    chosen = replace(read.task, metrics=asked.metrics) if asked.metrics else read.task
    notes = [note for examples in (validation, *read.more.values()) for note in _one_class(chosen, examples)]
    return TaskData(chosen, train, validation, read.more, split, (*read.notes, *notes))


def load_training_data(
    task: Task | str | None,
    data: str | Path | None = None,
    *,
    eval_data: str | Path | None = None,
    columns: Columns | str | None = None,
    hub_splits: Sequence[str] | str = (),
) -> tuple[Task, Examples, tuple[str, ...]]:
    """A task, its training examples alone, and notes; see `load_data`, which refuses `eval_data` then too."""
    columns = Columns.parse(columns) if isinstance(columns, str) else columns
    asked = _Asked(eval_data, columns, (), _names(hub_splits, "--hub-splits"))
    read = _read(task, data, asked, evaluated=False)
    return read.task, read.train, read.notes


def parse_split(split: str) -> tuple[str, float]:
    """``"glue"``, ``"paper"`` or ``"holdout:SHARE"``, and the share that is held out.

    Raises:
        DataError: anything else.
    """
    kind, _, share = split.partition(":")
    if kind == HOLDOUT:
        try:
            held = float(share)
        except ValueError:
            held = 0.0
        if not 0.0 < held < 1.0:
            raise DataError(f"--split {split}; expected {HOLDOUT}:SHARE, more than 0 and less than 1, such as 0.2")
        return kind, held
    if split not in (GLUE, PAPER):
        raise DataError(unknown("--split", split, (GLUE, PAPER, f"{HOLDOUT}:SHARE")))
    return kind, _PAPER_SHARE


def default_metrics(labels: tuple[str, ...] | None) -> tuple[str, ...]:
    """The metrics of a task that states none."""
    if labels is None:
        return "pearson", "spearman"
    return ("accuracy", "matthews_correlation") if len(labels) == 2 else ("accuracy",)


def _names(given: Sequence[str] | str, option: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in given.split(",")) if isinstance(given, str) and given else tuple(given)
    if not all(names):
        raise DataError(f"{option} {given}; expected names with commas between")
    return names


def _check_scores(task: Task, examples: Examples) -> None:
    """Refuse scores that are all the same, as the placeholders of an unlabelled split: nothing correlates with them."""
    if task.is_regression and len(set(examples.labels)) == 1:
        raise DataError(
            f"{task.name}: found the score {examples.labels[0]:g} alone in {examples.source} ({len(examples):,} in "
            "all); expected scores that differ, since a correlation with them is the metric: evaluate on labelled "
            "examples"
        )


def _one_class(task: Task, examples: Examples) -> list[str]:
    """A note on examples of a single class, with which nothing correlates either."""
    if "matthews_correlation" not in task.metrics or len(examples) < 2 or len(set(examples.labels)) > 1:
        return []
    name = (task.labels or ())[int(examples.labels[0])]
    return [
        f"{examples.source}: all {len(examples):,} examples to evaluate on are {name!r}: whatever is predicted, their "
        "Matthews correlation is 0"
    ]


def _dealt(read: _Read, kind: str, share: float, seed: int) -> tuple[Examples, Examples]:
    """Training and evaluation examples, as a function of those read and `seed`."""
    if kind == GLUE:
        assert read.validation is not None
        return read.train, read.validation
    whole = read.train if read.validation is None else pool((read.train, read.validation))
    parts = hold_out(whole, share, seed)
    # The seed is left out: runs that differ in it are runs of one recipe.
    train, held = (
        replace(part, source=f"{100 * size:g} % of {whole.source}")
        for part, size in zip(parts, (1 - share, share), strict=True)
    )
    return train, held


def _read(
    task: Task | str | None,
    data: str | Path | tuple[Examples, Examples] | None,
    asked: _Asked,
    *,
    evaluated: bool,
) -> _Read:
    if isinstance(data, tuple):
        asked.refuse("examples in memory", "eval_data", "columns", "hub_splits")
        if task is None:
            raise DataError("examples in memory without a task; expected a Task, or the name of a known one")
        return _Read(_known(task), data[0], data[1] if evaluated else None)
    if data is not None and table_kind(data):
        return _read_files(task, data, asked, evaluated=evaluated)
    if task is None:
        raise DataError(
            f"--data {data} without a --task; expected a task, or --data FILE that ends with {', '.join(KINDS)}"
        )
    if isinstance(task, str) and "/" in task:
        if data is not None:
            raise DataError(f"--task {task} is a data set, --data {data} another; expected one: leave --data out")
        return _read_hub(task, asked, evaluated=evaluated)
    known = _known(task)
    asked.refuse(f"the task {known.name}", "eval_data", "columns", "hub_splits")
    more = {split.removeprefix("validation_"): load_task(known, data, split) for split in known.more if evaluated}
    validation = load_task(known, data, "validation") if evaluated else None
    train = load_task(known, data, "train")
    parts = [train, *([] if validation is None else [validation]), *more.values()]
    return _Read(known, train, validation, more, tuple(note for part in parts for note in part.notes))


def _known(task: Task | str) -> Task:
    if isinstance(task, Task):
        return task
    if task not in TASKS:
        advice = ", owner/name of a hub data set, or a name of your own with --data FILE"
        if Path(task.partition(":")[0]).is_dir():
            advice += f"; the folder of this name is --task ./{task}"
        raise DataError(unknown("task", task, TASKS) + advice)
    return TASKS[task]


def _read_files(task: Task | str | None, data: str | Path, asked: _Asked, *, evaluated: bool) -> _Read:
    asked.refuse("--data files", "hub_splits")
    known = _known(task) if isinstance(task, Task) or task in TASKS else None
    if known is None and task is not None and "/" in str(task):
        raise DataError(f"--task {task} is a data set, --data {data} another; expected one: leave --data out")
    if known and asked.columns is None:
        raise DataError(
            f"--task {known.name} with the file {data}; expected a GLUE folder, or --columns for a file of your own"
        )
    if evaluated and asked.eval_data is None:
        raise DataError(
            f"no evaluation data beside {data}; expected --eval-data FILE, or --split holdout:0.2 to hold out a share "
            "of the training data"
        )
    if not evaluated:
        asked.refuse("--split holdout, which evaluates a part of the training data,", "eval_data")
    if evaluated and not table_kind(str(asked.eval_data)):
        raise DataError(f"--eval-data {asked.eval_data}; expected a file that ends with {', '.join(KINDS)}")
    columns, advice = _columns(asked)
    sources = table_files(data)
    tables = [read_table(file, columns.names, advice=advice) for file in sources]
    chosen, read, odd = _task(str(task or Path(data).name), known, tables, columns, asked)
    train = pool([_examples(table, columns, read) for table in tables])
    validation, notes = None, odd
    if evaluated:
        files = table_files(str(asked.eval_data))
        validation = pool([_examples(read_table(f, columns.names, advice=advice), columns, read) for f in files])
        both = {file.resolve() for file in sources} & {file.resolve() for file in files}
        notes += [f"{file.name} is in --data and in --eval-data: evaluated on training data" for file in sorted(both)]
    return _Read(chosen, train, validation, notes=tuple(notes))


def _read_hub(name: str, asked: _Asked, *, evaluated: bool) -> _Read:
    asked.refuse("a hub data set", "eval_data")
    repository, _, config = name.partition(":")
    if not Path(repository).is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", repository):
        raise DataError(f"--task {name}: no folder {repository}; expected one, or a hub data set, owner/name")
    names = hub_split_names(repository, config or None)
    splits, notes = _choose_splits(repository, names, asked, evaluated=evaluated)
    columns, advice = _columns(asked)
    tables = []
    for split in splits:
        table = read_hub_table(repository, config or None, split, columns.names, advice=advice)
        table, unlabelled = _labelled(table, columns)
        if unlabelled:
            notes.append(f"{table.source}: {unlabelled:,} examples without a label left out")
        tables.append(table)
    chosen, read, odd = _task(name, None, tables[:1], columns, asked)
    train, *evaluation = [_examples(table, columns, read) for table in tables]
    more = dict(zip(splits[2:], evaluation[1:], strict=True))
    return _Read(chosen, train, evaluation[0] if evaluation else None, more, (*notes, *odd))


def _choose_splits(
    repository: str, names: Sequence[str], asked: _Asked, *, evaluated: bool
) -> tuple[tuple[str, ...], list[str]]:
    """Which splits are read, the training split first, and notes on the choice."""
    chosen, notes = asked.hub_splits, []
    if not evaluated and len(chosen) > 1:
        raise DataError(
            f"--hub-splits {','.join(chosen)} with --split holdout, which evaluates a part of the training data; "
            "expected the training split alone"
        )
    chosen = chosen or ("train",)
    if evaluated and len(chosen) == 1:
        own = next((n for n in ("validation", "test") if n in names), None)
        if own is None:
            raise DataError(
                f"{repository} has the splits {', '.join(names)}; expected validation or test: name some with "
                "--hub-splits TRAIN,EVALUATION, or hold out a part of the training data with --split holdout:0.2"
            )
        if own == "test":
            notes.append(
                f"{repository} has no split named validation: evaluated on test; choose nothing by it (--hub-splits "
                "names other splits, --split holdout:0.2 leaves it alone)"
            )
        chosen = (*chosen, own)
    if len(set(chosen)) < len(chosen):
        raise DataError(f"--hub-splits {','.join(chosen)}; expected each split once")
    for name in chosen:
        if name not in names:
            raise DataError(unknown(f"split of {repository}", name, names) + "; name them with --hub-splits")
    return chosen, notes


def _labelled(table: Table, columns: Columns) -> tuple[Table, int]:
    """The rows with a label, and how many have none: −1 among class indices, as on the hub."""
    if columns.regression or columns.label not in table.classes:
        return table, 0
    kept = [i for i, value in enumerate(table.columns[columns.label]) if value is not None and value != -1]
    if not kept:
        raise DataError(f"{table.source}: found no example with a label; expected a labelled split: choose another")
    values = {name: [column[i] for i in kept] for name, column in table.columns.items()}
    return replace(table, columns=values, places=[table.places[i] for i in kept]), len(table) - len(kept)


def _columns(asked: _Asked) -> tuple[Columns, str]:
    """The columns, and what to do where one is missing."""
    if asked.columns:
        return asked.columns, "check --columns"
    return _PLAIN, "name yours, --columns text=NAME:label=NAME (two texts: text=NAME,NAME; a regression: score=NAME)"


def _task(
    name: str, known: Task | None, tables: Sequence[Table], columns: Columns, asked: _Asked
) -> tuple[Task, Callable[[Any, str], float], list[str]]:
    """The task that training tables are of, what reads a label of it, and notes on its classes."""
    if known:
        if known.is_regression != columns.regression:
            wanted = "score" if known.is_regression else "label"
            raise DataError(f"--task {known.name}; expected --columns text=…:{wanted}={columns.label}")
        return known, label_reader(known.labels), []
    own, notes = tables[0].classes.get(columns.label), []
    if columns.regression:
        labels, read = None, label_reader(None)
    elif own:
        labels, read = own, label_reader(own)
    else:
        labels = find_classes(tables, columns.label)
        read, notes = class_reader(labels), missing_labels(tables, columns.label)
    return Task(name, labels, asked.metrics or default_metrics(labels)), read, notes


def _examples(table: Table, columns: Columns, read: Callable[[Any, str], float]) -> Examples:
    return to_examples(table, columns.texts, columns.label, read)
