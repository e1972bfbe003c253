"""Which runs an experiment has: models × tasks × arms × fractions × seeds."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from guided_dropout.errors import GuidedDropoutError


@dataclass(frozen=True, order=True)
class RunKey:
    """Which run of an experiment.

    Attributes:
        model: the model's label, such as ``"bert-base-uncased"``.
        task: name of the task.
        fraction: part of the training data, in (0, 1].
        arm: label of the arm: its name, and the parameters that are not its defaults.
        seed: from which `results.Seeds` are derived; runs that share it are paired over the arms.
    """

    model: str
    task: str
    fraction: float
    arm: str
    seed: int

    @property
    def name(self) -> str:
        """As a file name: ``"bert-base-uncased_cola_0.1_mixout-p=0.7_003"``."""
        parts = (self.model, self.task, f"{self.fraction:g}", self.arm)
        return "_".join(re.sub(r"[^\w.=+-]", "-", part) for part in parts) + f"_{self.seed:03d}"


@dataclass(frozen=True)
class Grid:
    """All combinations.

    Attributes:
        models: their labels.
        tasks: their names.
        arms: their labels.
        fractions: parts of the training data.
        seeds: which.

    Raises:
        GuidedDropoutError: an empty axis, a value given twice, a fraction or seed out of range, or two runs whose files
            would have the same name.
    """

    models: Sequence[str]
    tasks: Sequence[str]
    arms: Sequence[str]
    fractions: Sequence[float]
    seeds: Sequence[int]

    def __post_init__(self) -> None:
        for axis in ("models", "tasks", "arms", "fractions", "seeds"):
            values: Sequence[object] = getattr(self, axis)
            if not values:
                raise GuidedDropoutError(f"found no {axis}; expected at least one: name some")
            double = [v for v in dict.fromkeys(values) if list(values).count(v) > 1]
            if double:
                raise GuidedDropoutError(f"found {double[0]!r} twice in the {axis}; expected it once: leave one out")
        for fraction in self.fractions:
            if not 0.0 < fraction <= 1.0:
                raise GuidedDropoutError(f"a train fraction of {fraction}; expected more than 0 and at most 1")
        for seed in self.seeds:
            if seed < 0:
                raise GuidedDropoutError(f"the seed {seed}; expected 0 or more")
        files: dict[str, RunKey] = {}
        for key in self:
            other = files.setdefault(key.name, key)
            if other != key:
                raise GuidedDropoutError(
                    f"the runs {other} and {key} would share the file {key.name}; expected names that tell them apart: "
                    "rename a model's folder, or choose fractions that differ by more"
                )

    def __iter__(self) -> Iterator[RunKey]:
        """All runs, seed after seed, so that what is there at any moment is paired, with all arms side by side."""
        axes = (self.seeds, self.models, self.tasks, self.fractions, self.arms)
        for seed, model, task, fraction, arm in itertools.product(*axes):
            yield RunKey(model, task, fraction, arm, seed)

    def __len__(self) -> int:
        axes = (self.models, self.tasks, self.arms, self.fractions, self.seeds)
        size = 1
        for axis in axes:
            size *= len(axis)
        return size
