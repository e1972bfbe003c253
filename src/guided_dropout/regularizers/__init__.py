"""What can be put on a model to keep fine-tuning from overfitting, and taken off again: one idea a file."""

from guided_dropout.regularizers.base import Context, Handle, Regularizer
from guided_dropout.regularizers.child_tuning import ChildTuning
from guided_dropout.regularizers.ewc import EWC
from guided_dropout.regularizers.gaussian import GaussianDropout
from guided_dropout.regularizers.guided_decay import GuidedDecay
from guided_dropout.regularizers.l2_sp import L2SP, GuidedL2SP
from guided_dropout.regularizers.llrd import LayerwiseDecay
from guided_dropout.regularizers.mixout import Mixout
from guided_dropout.regularizers.r_drop import RDrop
from guided_dropout.regularizers.rates import DropoutHandle, apply_dropout, dropout_table
from guided_dropout.regularizers.residual import add_residual_sites
from guided_dropout.regularizers.surgical import Surgical

__all__ = [
    "EWC",
    "L2SP",
    "ChildTuning",
    "Context",
    "DropoutHandle",
    "GaussianDropout",
    "GuidedDecay",
    "GuidedL2SP",
    "Handle",
    "LayerwiseDecay",
    "Mixout",
    "RDrop",
    "Regularizer",
    "Surgical",
    "add_residual_sites",
    "apply_dropout",
    "dropout_table",
]
