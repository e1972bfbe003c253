"""Dropout rates for fine-tuning language models, guided by the Fisher information of the pretrained weights."""

from guided_dropout.callbacks import GuidedDropoutCallback
from guided_dropout.fisher import FisherProfile, estimate_fisher
from guided_dropout.regularizers import DropoutHandle, add_residual_sites, apply_dropout
from guided_dropout.schedule import DropoutSchedule
from guided_dropout.sites import DropoutSite, find_sites

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
