"""Whole experiments by name: the paper's, its rivals', and the controls that decide whether guidance helps.

A recipe is data: what `bench run` would be told by options. Options given beside it come before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from guided_dropout.arms import ARMS
from guided_dropout.errors import GuidedDropoutError, unknown

_SMALL = ("cola", "mrpc", "rte", "stsb")
_ALL = (*_SMALL, "mnli", "qnli", "qqp", "sst2", "wnli")
_PAPER = ("dropout", "gaussian", "guided")


@dataclass(frozen=True)
class NamedExperiment:
    """A whole experiment, but for the model.

    Attributes:
        summary: what it is, in a line.
        tasks: names in `tasks.TASKS`.
        arms: labels.
        fractions: parts of the training data.
        seeds: how many.
        recipe: what differs from the usual `recipe.Recipe`.
        split: ``"glue"`` or ``"paper"``.
    """

    summary: str
    tasks: Sequence[str]
    arms: Sequence[str]
    fractions: Sequence[float]
    seeds: int
    recipe: Mapping[str, Any] = field(default_factory=dict)
    split: str = "glue"


RECIPES = {
    "paper_table2": NamedExperiment(
        "Table 2 of the paper: nine tasks, three arms, five restarts on pooled and re-split data",
        _ALL, _PAPER, (1.0,), 5, split="paper",
    ),
    "paper_figure4": NamedExperiment(
        "Figure 4: four small tasks at 100 % to 10 % of the training data",
        _SMALL, _PAPER, tuple(n / 10 for n in range(10, 0, -1)), 5, split="paper",
    ),
    "paper_a5": NamedExperiment(
        "Appendix A.5: thirty restarts of plain dropout on CoLA (BERT-large there)",
        ("cola",), ("dropout",), (1.0,), 30, {"batch_size": 8}, split="paper",
    ),
    "lodha": NamedExperiment(
        "surgical fine-tuning (Lodha et al. 2023) against guided dropout, at 100 % and 50 %",
        _SMALL, ("dropout", "surgical", "guided"), (1.0, 0.5), 5, split="paper",
    ),
    "controls": NamedExperiment(
        "does guidance help, or less dropout? All controls and rivals, 20 paired seeds, little and much data",
        _SMALL, (*ARMS, "shuffled:seed=1", "shuffled:seed=2"), (1.0, 0.25, 0.1), 20,
        {"weight_decay": 0.01},  # BERT's own; `guided-decay` spreads it
    ),
}  # fmt: skip


def get_recipe(name: str) -> NamedExperiment:
    """The recipe of that name in `RECIPES`.

    Raises:
        GuidedDropoutError: there is none; the nearest names are given.
    """
    if name not in RECIPES:
        raise GuidedDropoutError(unknown("recipe", name, RECIPES))
    return RECIPES[name]
