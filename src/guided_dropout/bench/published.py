"""What the paper reports, to stand beside one's own results. Facts about another model, as a rule, and other splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from guided_dropout.artefacts import read_json


@dataclass(frozen=True)
class PublishedRow:
    """One arm at one fraction of the training data.

    Attributes:
        arm: name of the arm here that it belongs to.
        fraction: of the training data.
        values: task → maximum and mean over the restarts, or a single figure; accuracies as shares.
        note: what is special about it.
    """

    arm: str
    fraction: float
    values: Mapping[str, Sequence[float]]
    note: str = ""


@dataclass(frozen=True)
class Published:
    """All of it.

    Attributes:
        source: where it is from.
        model: which was fine-tuned.
        restarts: of each arm and task.
        split: how training and test data were told apart.
        rows: the figures.
    """

    source: str
    model: str
    restarts: int
    split: str
    rows: tuple[PublishedRow, ...]

    def beside(self, arms: Sequence[str], tasks: Sequence[str], fraction: float) -> list[PublishedRow]:
        """The rows at `fraction` for any of `arms` that have any of `tasks`."""
        return [r for r in self.rows if r.fraction == fraction and r.arm in arms and any(t in r.values for t in tasks)]

    def is_of(self, model: str) -> bool:
        """Whether `model` (a label, folder or hub name) is called like the one that they are of."""
        return Path(model).name == self.model


@cache
def published() -> Published:
    """The figures that come with this package."""
    with resources.as_file(resources.files("guided_dropout.bench").joinpath("published.json")) as file:
        facts = read_json(file, kind="published-results", schema=1)
    rows = tuple(PublishedRow(**row) for row in facts["rows"])
    return Published(facts["source"], facts["model"], facts["restarts"], facts["split"], rows)
