"""The Fisher information of a model, measured."""

from guided_dropout.fisher.estimate import estimate_fisher
from guided_dropout.fisher.merging import merge
from guided_dropout.fisher.profile import FisherProfile

__all__ = ["FisherProfile", "estimate_fisher", "merge"]
