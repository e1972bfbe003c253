"""Made-up experiments, written as `bench run` writes them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from samples_of_results import run as result

from guided_dropout.bench.folder import Experiment, Failure, Run
from guided_dropout.bench.grid import Grid, RunKey
from guided_dropout.results import RunResult

METRICS = {"cola": "matthews_correlation", "stsb": "pearson"}
SIZES = {"cola": (8551, 1043), "mrpc": (3668, 408), "rte": (2490, 277), "stsb": (5749, 1500)}
RATES = {"dropout": 0.1, "none": 0.0, "gaussian": 0.1}


def made(key: RunKey, value: float | None, *, collapsed: bool = False, **changes: Any) -> RunResult:
    """What a run gave."""
    metric = METRICS.get(key.task, "accuracy")
    train, evaluation = SIZES.get(key.task, (1000, 500))
    guided = key.arm.partition(":")[0] in (
        "guided", "guided-gaussian", "uniform", "reversed", "shuffled", "depth-linear", "magnitude",
    )  # fmt: skip
    rate = RATES.get(key.arm, 0.05 if guided else 0.1)
    facts = {
        "task": key.task,
        "metric": metric,
        "metrics": {metric: value},
        "history": [{"epoch": 3, "train_loss": 0.4, "eval_loss": 0.5, "metrics": {metric: value}}],
        "collapsed": collapsed,
        "recipe": {
            "train_fraction": key.fraction, "epochs": 3, "batch_size": 16, "learning_rate": 2e-5,
            "n_train": round(train * key.fraction), "n_eval": evaluation, "train_data": "train.tsv",
            "eval_data": "dev.tsv",
        },
        "rates": {"mean": rate, "min": rate, "max": rate, "sites": 3, "shape": "linear"},
        "model": {"name_or_path": key.model},
        "times": {"total": 30.0},
        "provenance": {
            "versions": {"guided-dropout": "0.1.0", "torch": "2.9"}, "python": "3.11", "platform": "Linux x86_64",
            "threads": 1, "date": "2026-01-01T00:00:00+00:00", "device": "cpu",
        },
    }  # fmt: skip
    return result(key.arm, key.seed, value, **{**facts, **changes})


def accuracy_like(key: RunKey, effects: Mapping[str, float], spread: float = 0.01) -> float:
    """A metric as a run might have it: the seed moves it more than the arm, and more with less data."""
    _, evaluation = SIZES.get(key.task, (1000, 500))
    base = {"cola": 0.55, "mrpc": 0.82, "rte": 0.64, "stsb": 0.86}.get(key.task, 0.8)
    less = 0.12 * (1 - key.fraction) ** 2
    seed = np.random.default_rng([key.seed, len(key.task), round(1000 * key.fraction)])
    own = np.random.default_rng([key.seed, *map(ord, f"{key.model}{key.task}{key.fraction}{key.arm}")])
    effect = effects.get(key.arm, effects.get(key.arm.partition(":")[0], 0.0))
    scale = spread / max(key.fraction, 0.05) ** 0.4
    value = base - less + effect + scale * (seed.normal() + 0.6 * own.normal())
    return float(value if key.task in METRICS else round(value * evaluation) / evaluation)


def write_experiment(
    folder: Path,
    *,
    models: Sequence[str] = ("demo",),
    tasks: Sequence[str] = ("cola", "rte"),
    arms: Sequence[str] = ("dropout", "uniform", "shuffled", "guided"),
    fractions: Sequence[float] = (1.0, 0.1),
    seeds: int = 5,
    effects: Mapping[str, float] | None = None,
    value: Callable[[RunKey], float | Exception | None] | None = None,
    collapsed: Callable[[RunKey], bool] = lambda key: False,
    missing: Callable[[RunKey], bool] = lambda key: False,
) -> Experiment:
    """An experiment's folder.

    Args:
        folder: where.
        models, tasks, arms, fractions, seeds: the grid.
        effects: what an arm adds to the metric.
        value: a run's metric, None if it diverged, or an exception if it failed; by default `accuracy_like`.
        collapsed: which runs predict one class.
        missing: which runs are not made yet.
    """
    grid = Grid(list(models), list(tasks), list(arms), list(fractions), list(range(seeds)))
    schedule = {"digest": "abc", "shape": "linear", "grouping": "owner", "aggregate": "tensor_mean", "mean_rate": 0.05}
    facts = {
        "recipe": {"epochs": 3, "batch_size": 16, "learning_rate": 2e-5, "data": "glue", "evaluate": "end"},
        "models": {m: {"source": m, "schedule": schedule} for m in models},
    }
    experiment = Experiment.start(folder, facts)
    experiment.note_grid(grid)
    for key in grid:
        if missing(key):
            continue
        found = value(key) if value else accuracy_like(key, effects or {})
        if isinstance(found, Exception):
            experiment.write(Run(key, failure=Failure.of(found)))
        else:
            experiment.write(Run(key, result=made(key, found, collapsed=collapsed(key))))
    return experiment
