"""Labelled tasks as a table: GLUE's folders and hub data sets, their columns, labels and metrics.

A task is data. One of your own is a `Task` with a name, labels and metrics; `task_data` reads its examples.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from sklearn import metrics as sk

from guided_dropout.data.examples import (
    Examples,
    GlueFiles,
    HubData,
    find_glue_file,
    listing,
    read_glue_file,
    read_hub_data,
    subset,
)
from guided_dropout.errors import DataError, unknown

__all__ = [
    "METRICS",
    "TASKS",
    "Examples",
    "GlueFiles",
    "HubData",
    "Metric",
    "Task",
    "compute_metrics",
    "get_task",
    "load_task",
    "subset",
]

HUB_REPOSITORY = "nyu-mll/glue"


@dataclass(frozen=True)
class Task:
    """What is predicted from a text or a pair of texts, and how it is scored.

    Attributes:
        name: for people and for the command line.
        labels: names of the classes, by index; None for regression.
        metrics: names in `METRICS`; the first is the main one.
        files: layout of GLUE's folder, where there is one.
        hub: layout of the hub data set, where there is one.
        more: further evaluation splits, evaluated once, after the last epoch; their names, without ``validation_``, go
            behind those of the metrics.
        empty_second: whether the second of two texts may be empty in `files` and `hub`, as two of QQP's questions are.

    Raises:
        DataError: a metric that does not exist, stands twice or does not suit the labels.
    """

    name: str
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]
    files: GlueFiles | None = None
    hub: HubData | None = None
    more: tuple[str, ...] = ()
    empty_second: bool = False

    def __post_init__(self) -> None:
        if not self.metrics:
            raise DataError(f"task {self.name!r} has no metric; expected at least one of {', '.join(METRICS)}")
        for metric in self.metrics:
            if metric not in METRICS:
                raise DataError(unknown("metric", metric, METRICS))
            if self.metrics.count(metric) > 1:
                raise DataError(f"task {self.name!r} has the metric {metric} twice; expected each once: leave one out")
            if not METRICS[metric].suits(self.labels):
                wants = METRICS[metric].wants
                raise DataError(f"task {self.name!r} has the metric {metric}, which expects {wants}: choose another")

    @property
    def main_metric(self) -> str:
        """Name of the metric that stands for a run."""
        return self.metrics[0]

    @property
    def is_regression(self) -> bool:
        """Whether a score is predicted, not a class."""
        return self.labels is None

    @property
    def num_labels(self) -> int:
        """Outputs of the head: the number of classes, 1 for regression."""
        return 1 if self.labels is None else len(self.labels)


@dataclass(frozen=True)
class Metric:
    """A score of predictions against labels, and which labels it can score."""

    function: Callable[[np.ndarray, np.ndarray], float]
    wants: str

    def suits(self, labels: tuple[str, ...] | None) -> bool:
        """Whether a task with these labels can be scored so."""
        return {
            "regression": labels is None,
            "two classes": labels is not None and len(labels) == 2,
            "classes": labels is not None,
        }[self.wants]


def _matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
    return 0.0 if _constant(predictions) or _constant(labels) else float(sk.matthews_corrcoef(labels, predictions))


def _accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(predictions == labels))


def _f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    return float(sk.f1_score(labels, predictions, pos_label=1, zero_division=0.0))  # pyright: ignore[reportArgumentType]


def _correlation(function: Callable[..., Any]) -> Callable[[np.ndarray, np.ndarray], float]:
    def correlation(predictions: np.ndarray, labels: np.ndarray) -> float:
        if _constant(predictions) or _constant(labels):
            return 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.NearConstantInputWarning)
            value = float(function(predictions, labels).statistic)
        return value if math.isfinite(value) else 0.0

    return correlation


def _constant(values: np.ndarray) -> bool:
    return bool(np.all(values == values[0]))


METRICS = {
    "accuracy": Metric(_accuracy, "classes"),
    "f1": Metric(_f1, "two classes"),
    "matthews_correlation": Metric(_matthews, "classes"),
    "pearson": Metric(_correlation(stats.pearsonr), "regression"),
    "spearman": Metric(_correlation(stats.spearmanr), "regression"),
}

_NLI = ("entailment", "not_entailment")
_PAIR = ("sentence1", "sentence2")
_MNLI_SPLITS = {
    "train": "train",
    "validation": "validation_matched",
    "validation_mismatched": "validation_mismatched",
}
_MNLI_FILES = {"train": "train.tsv", "validation": "dev_matched.tsv", "validation_mismatched": "dev_mismatched.tsv"}

TASKS = {
    task.name: replace(task, empty_second=True)
    for task in (
        Task(
            "cola",
            ("unacceptable", "acceptable"),
            ("matthews_correlation", "accuracy"),
            GlueFiles("CoLA", ("sentence",), "label", columns=("source", "label", "star", "sentence")),
            HubData("cola", ("sentence",)),
        ),
        Task(
            "sst2",
            ("negative", "positive"),
            ("accuracy",),
            GlueFiles("SST-2", ("sentence",), "label"),
            HubData("sst2", ("sentence",)),
        ),
        Task(
            "mrpc",
            ("not_equivalent", "equivalent"),
            ("accuracy", "f1"),
            GlueFiles("MRPC", ("#1 String", "#2 String"), "Quality"),
            HubData("mrpc", _PAIR),
        ),
        Task("stsb", None, ("pearson", "spearman"), GlueFiles("STS-B", _PAIR, "score"), HubData("stsb", _PAIR)),
        Task(
            "qqp",
            ("not_duplicate", "duplicate"),
            ("accuracy", "f1"),
            GlueFiles("QQP", ("question1", "question2"), "is_duplicate", broken=("train",)),
            HubData("qqp", ("question1", "question2")),
        ),
        Task(
            "mnli",
            ("entailment", "neutral", "contradiction"),
            ("accuracy",),
            GlueFiles("MNLI", _PAIR, "gold_label", names=_MNLI_FILES),
            HubData("mnli", ("premise", "hypothesis"), _MNLI_SPLITS),
            more=("validation_mismatched",),
        ),
        Task(
            "qnli",
            _NLI,
            ("accuracy",),
            GlueFiles("QNLI", ("question", "sentence"), "label"),
            HubData("qnli", ("question", "sentence")),
        ),
        Task("rte", _NLI, ("accuracy",), GlueFiles("RTE", _PAIR, "label"), HubData("rte", _PAIR)),
        Task(
            "wnli",
            ("not_entailment", "entailment"),
            ("accuracy",),
            GlueFiles("WNLI", _PAIR, "label"),
            HubData("wnli", _PAIR),
        ),
    )
}


def get_task(name: str) -> Task:
    """The task of that name in `TASKS`.

    Raises:
        DataError: there is none; the nearest names are given.
    """
    if name not in TASKS:
        raise DataError(unknown("task", name, TASKS))
    return TASKS[name]


def compute_metrics(task: Task, predictions: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """All metrics of `task`.

    Args:
        task: says which.
        predictions: [N] class indices, or for regression scores.
        labels: [N] likewise.

    Returns:
        For each of ``task.metrics`` its value. A correlation with a constant is 0.

    Raises:
        DataError: no predictions, or not as many as labels.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.shape != labels.shape or predictions.ndim != 1 or not predictions.size:
        raise DataError(
            f"predictions of shape {predictions.shape} and labels of shape {labels.shape}; "
            "expected two vectors of the same length, not empty"
        )
    return {name: METRICS[name].function(predictions, labels) for name in task.metrics}


def load_task(task: Task, data: str | Path | None = None, split: str = "train") -> Examples:
    """Read one split of `task`.

    Args:
        task: one of `TASKS`, or one with `Task.files` or `Task.hub` of its own.
        data: a GLUE folder (``CoLA/train.tsv``, …) or the task's folder in it; a data set folder or hub repository laid
            out like ``nyu-mll/glue``; None for that repository on the hub.
        split: ``"train"`` or ``"validation"`` (``"validation_mismatched"`` too for MNLI).

    Raises:
        DataError: no such task data, or a malformed line, named by file and number.
    """
    known = (task.files and task.files.names) or (task.hub and task.hub.splits) or {}
    if not known:
        raise DataError(f"task {task.name} has no data of its own; expected examples: give a pair (train, validation)")
    if split not in known:
        raise DataError(unknown(f"split of {task.name}", split, known))
    if data is None:
        return _from_hub(task, HUB_REPOSITORY, split)
    folder = Path(data).expanduser()
    if task.files and (file := find_glue_file(task.files, folder, split)):
        return read_glue_file(task.files, file, task.labels, split=split, empty_second=task.empty_second)
    if folder.is_dir():
        if not (folder / "README.md").is_file() and not any(folder.rglob("*.parquet")):
            wanted = f"{task.files.folder}/{task.files.names[split]}" if task.files else "data set"
            raise DataError(f"no {wanted} in {folder}, which holds {listing(folder)}; expected a GLUE folder: check it")
        return _from_hub(task, str(folder), split)
    if folder.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(data)):
        raise DataError(f"no folder {data}; expected a GLUE folder or a hub repository (owner/name): check the path")
    return _from_hub(task, str(data), split)


def _from_hub(task: Task, repository: str, split: str) -> Examples:
    if task.hub is None:
        raise DataError(f"task {task.name} has no hub data set; expected a folder that holds it: give --data")
    return read_hub_data(task.hub, repository, split, task.labels, empty_second=task.empty_second)
