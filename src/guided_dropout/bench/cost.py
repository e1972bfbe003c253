"""How long runs will take: from the text that they read, and from how fast a few of them went."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from guided_dropout.bench.folder import Run
from guided_dropout.bench.grid import RunKey
from guided_dropout.bench.plan import Plan
from guided_dropout.tasks import Examples
from guided_dropout.workbench import Workbench

# A step back costs about two steps forward.
_TRAINING = 3.0
_TRIAL_STEPS = 3


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


def work_of_tasks(plan: Plan) -> dict[str, Work]:
    """For each task what its runs read."""
    bench = Workbench(next(iter(plan.models.values())).source)
    sizes = {}
    for name in plan.grid.tasks:
        given = bench.data(name, plan.data, split=plan.split)
        evaluated = sum(map(_characters, (given.validation, *given.more.values())))
        sizes[name] = Work(_characters(given.train), evaluated, plan.training.epochs)
    return sizes


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
        self._seconds: dict[str, float] = {}
        self._read: dict[str, float] = {}

    def size(self, model: str) -> int:
        """Parameters of a model."""
        return self._sizes[model]

    def units(self, key: RunKey) -> float:
        """A run's cost: text read times parameters."""
        return self._work[key.task].of(key.fraction) * self._sizes[key.model]

    def saw(self, key: RunKey, seconds: float) -> None:
        """Note how long a run took."""
        self._seconds[key.model] = self._seconds.get(key.model, 0.0) + seconds
        self._read[key.model] = self._read.get(key.model, 0.0) + self.units(key)

    def saw_runs(self, runs: Sequence[Run]) -> None:
        """Note how long runs of this experiment took, those of other tasks and models left out."""
        for run in runs:
            if run.result and run.key.task in self._work and run.key.model in self._sizes:
                self.saw(run.key, run.result.times["total"])

    def seconds(self, keys: Sequence[RunKey]) -> float | None:
        """How long one process will take for `keys`; None where nothing was seen yet."""
        if not self._read:
            return None
        anywhere = sum(self._seconds.values()) / sum(self._read.values())
        pace = {m: self._seconds[m] / self._read[m] for m in self._read}
        return sum(self.units(k) * pace.get(k.model, anywhere) for k in keys)


def trial(plan: Plan, model: str, task: str) -> tuple[float, float]:
    """Train a few steps with plain dropout, to learn how fast that goes here.

    Returns:
        Seconds, and the characters read, counted as `Work.of` does.
    """
    bench = Workbench(plan.models[model].source)
    given, training = bench.data(task, plan.data, split=plan.split), plan.training
    chosen, examples = given.task, given.train
    size = training.batch_size
    some = examples.take(range(min(len(examples), size * _TRIAL_STEPS)))
    classifier = bench.classifier(chosen.num_labels, head_seed=0).train()
    encoded = bench.encoded(some, chosen, training.max_length)
    device = "cuda" if plan.device != "cpu" and torch.cuda.is_available() else "cpu"
    classifier.to(torch.device(device))  # pyright: ignore[reportArgumentType]
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=0.0)
    begun = 0.0
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        for step in range(-1, (len(some) + size - 1) // size):  # the first one warms up
            if step == 0:
                begun = time.perf_counter()
            at = max(step, 0) * size
            rows = [encoded[i] for i in range(at, min(at + size, len(some)))]
            labels = torch.tensor([row["label"] for row in rows])
            texts = [{k: v for k, v in row.items() if k != "label"} for row in rows]
            batch = bench.tokenizer.pad(texts, return_tensors="pt")
            classifier(**batch.to(device), labels=labels.to(device)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    return seconds, _TRAINING * _characters(some)
