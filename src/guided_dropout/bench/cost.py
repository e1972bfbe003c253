"""How long runs will take: from the text that they read, and from how fast a few of them went."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from guided_dropout.bench.folder import Run
from guided_dropout.bench.grid import RunKey
from guided_dropout.bench.plan import Plan
from guided_dropout.data.tasks import Examples
from guided_dropout.finetune import finetune
from guided_dropout.workbench import Workbench

# A step back costs about two steps forward.
_TRAINING = 3.0
_TRIAL_STEPS = 4


@dataclass(frozen=True)
class Work:
    """Characters of text that a task's runs read.

    Attributes:
        train: in all training examples.
        evaluation: in all validation examples.
        epochs: passes over the training examples.
    """

    train: int
    evaluation: int
    epochs: int

    def of(self, fraction: float) -> float:
        """Characters read in a run, with those of training counted as often as a step back and forth costs."""
        return _TRAINING * self.epochs * fraction * self.train + self.evaluation


def work_of_tasks(plan: Plan, told: Callable[[str], Any] = lambda note: None) -> dict[str, Work]:
    """For each task what its runs read.

    Args:
        plan: of the runs.
        told: called with each sentence that a person should know of the data.

    Raises:
        GuidedDropoutError: the data of a task cannot be read.
    """
    bench = Workbench(next(iter(plan.models.values())).source)
    sizes = {}
    for name in plan.grid.tasks:
        given = bench.data(name, **asdict(plan.source))
        for note in given.notes:
            told(note)
        evaluated = sum(map(_characters, (given.validation, *given.more.values())))
        sizes[name] = Work(_characters(given.train), evaluated, plan.recipe.epochs)
    return sizes


def _few(examples: Examples) -> Examples:
    """Two that have not the same label, where there are such: with others there is no metric."""
    other = next((i for i, label in enumerate(examples.labels) if label != examples.labels[0]), 0)
    return examples.take(sorted({0, other}))


def _characters(examples: Examples) -> int:
    return sum(len(part) for text in examples.texts for part in text)


class Clock:
    """Tells how long runs will take, from those that are done.

    Args:
        work: by task.
        sizes: parameters of each model by label: until one of its runs is done, its speed is inferred from another's.
    """

    def __init__(self, work: Mapping[str, Work], sizes: Mapping[str, int]):
        self._work, self._sizes = work, sizes
        # By model and task: texts of other lengths take another time for each character.
        self._seen: dict[tuple[str, str], tuple[float, float]] = {}

    def units(self, key: RunKey) -> float:
        """A run's cost: text read times parameters."""
        return self._work[key.task].of(key.fraction) * self._sizes[key.model]

    def saw(self, key: RunKey, seconds: float) -> None:
        """Note how long a run took."""
        self._add(key.model, key.task, seconds, self.units(key))

    def saw_runs(self, runs: Sequence[Run]) -> None:
        """Note how long runs of this experiment took, those of other tasks and models left out."""
        for run in runs:
            if run.result and run.key.task in self._work and run.key.model in self._sizes:
                self.saw(run.key, run.result.times["total"])

    def saw_trial(self, model: str, task: str, seconds: float, read: float) -> None:
        """Note what `trial` found."""
        self._add(model, task, seconds, read * self._sizes[model])

    def seconds(self, keys: Sequence[RunKey]) -> float | None:
        """How long one process will take for `keys`; None where nothing was seen yet."""
        if not self._seen:
            return None
        return sum(self.units(key) * self._pace(key) for key in keys)

    def _add(self, model: str, task: str, seconds: float, units: float) -> None:
        before = self._seen.get((model, task), (0.0, 0.0))
        self._seen[model, task] = before[0] + seconds, before[1] + units

    def _pace(self, key: RunKey) -> float:
        """Seconds for a unit: of that model and task, else of what is nearest to them."""
        model = [seen for (name, _), seen in self._seen.items() if name == key.model]
        own = [self._seen[key.model, key.task]] if (key.model, key.task) in self._seen else []
        seconds, units = zip(*(own or model or self._seen.values()), strict=True)
        return sum(seconds) / sum(units)


def trial(plan: Plan, model: str, task: str) -> tuple[float, float]:
    """Train a few steps with plain dropout, to learn how fast that goes here.

    Returns:
        Seconds, and the characters read, counted as `Work.of` does.
    """
    bench, sites = Workbench(plan.models[model].source), plan.models[model].residual_sites
    recipe = replace(plan.recipe, epochs=1, residual_sites=sites)
    given = bench.data(task, **asdict(plan.source))
    some = given.train.take(range(min(len(given.train), recipe.batch_size * (_TRIAL_STEPS + 1))))
    ends: list[float] = []
    run = finetune(
        bench,
        data=replace(given, train=some, validation=_few(given.validation), more={}),
        arm="dropout",
        progress=lambda *_: ends.append(time.perf_counter()),
        **asdict(recipe),
    )
    read = _TRAINING * _characters(some)
    # The first step warms up; where it is the only one, it counts.
    return (ends[-1] - ends[0], read * (len(ends) - 1) / len(ends)) if len(ends) > 1 else (run.times["train"], read)
