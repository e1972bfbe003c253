"""Dropout rates for fine-tuning language models, guided by the Fisher information of the pretrained weights."""

from typing import TYPE_CHECKING, Any

from guided_dropout.fisher import FisherProfile, estimate_fisher
from guided_dropout.regularizers import DropoutHandle, add_residual_sites, apply_dropout
from guided_dropout.schedule import DropoutSchedule
from guided_dropout.sites import DropoutSite, find_sites

if TYPE_CHECKING:
    from guided_dropout.callbacks import GuidedDropoutCallback

__all__ = [
    "DropoutHandle",
    "DropoutSchedule",
    "DropoutSite",
    "FisherProfile",
    "GuidedDropoutCallback",
    "add_residual_sites",
    "apply_dropout",
    "estimate_fisher",
    "find_sites",
]


def __getattr__(name: str) -> Any:
    if name == "GuidedDropoutCallback":  # with it comes the Trainer, which takes seconds to import
        from guided_dropout.callbacks import GuidedDropoutCallback

        return GuidedDropoutCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
