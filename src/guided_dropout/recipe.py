"""The recipe of a training run: its numbers, and what they may be."""

from __future__ import annotations

import math
from dataclasses import dataclass

from guided_dropout.errors import GuidedDropoutError

PRECISIONS = ("auto", "float32", "bfloat16")
EVALUATE = ("epoch", "end")


@dataclass(frozen=True)
class Recipe:
    """How a run is trained; see `finetune.finetune` for each number.

    Raises:
        GuidedDropoutError: a number that is out of range.
        ScheduleError: a rate that is.
    """

    train_fraction: float = 1.0
    epochs: int = 3
    batch_size: int = 16
    learning_rate: float = 2e-5
    warmup_ratio: float = 0.1
    weight_decay: float = 0.0
    max_length: int = 128
    rate: float = 0.1
    device: str = "auto"
    precision: str = "auto"
    evaluate: str = "epoch"
    residual_sites: bool = False

    def __post_init__(self) -> None:
        # Not above: it takes seconds to import, and the command line's help reads the defaults alone.
        from guided_dropout.schedule.shapes import check_rate

        rules = {
            "epochs": (self.epochs >= 1, "at least 1"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "learning_rate": (0.0 < self.learning_rate < math.inf, "more than 0"),
            "warmup_ratio": (0.0 <= self.warmup_ratio < 1.0, "at least 0 and less than 1"),
            "weight_decay": (0.0 <= self.weight_decay < math.inf, "at least 0"),
            "max_length": (self.max_length >= 4, "at least 4 tokens"),
            "device": (self.device in ("auto", "cpu"), "'auto' or 'cpu'"),
            "precision": (self.precision in PRECISIONS, " or ".join(map(repr, PRECISIONS))),
            "evaluate": (self.evaluate in EVALUATE, " or ".join(map(repr, EVALUATE))),
        }
        check_rate("the plain arms", self.rate)
        for name, (holds, wanted) in rules.items():
            if not holds:
                raise GuidedDropoutError(f"{name} is {getattr(self, name)}; expected {wanted}")
