"""The Fisher information of a model, measured."""

from guided_dropout.fisher.estimate import estimate_fisher
from guided_dropout.fisher.merging import merge
from guided_dropout.fisher.profile import FisherProfile
from guided_dropout.fisher.ranking import RankingTest
from guided_dropout.fisher.stability import StabilityTest

__all__ = ["FisherProfile", "RankingTest", "StabilityTest", "estimate_fisher", "merge"]
