"""Elastic weight consolidation: what the pretrained task needs moves least."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from guided_dropout.errors import ModelError
from guided_dropout.regularizers.base import Context, Handle, Regularizer, check_number
from guided_dropout.regularizers.penalty import Pull, QuadraticPenalty
from guided_dropout.regularizers.pretrained import fisher_of, pretrained_parameters


@dataclass(frozen=True)
class EWC(Regularizer):
    r"""Holds each pretrained parameter near its start, the more the Fisher information says that it matters there.

    .. math:: \Omega(\theta) = \frac\lambda2\sum_j F_j\,(\theta_j-\theta_j^*)^2

    is added to the loss (eq. 3 of Kirkpatrick et al., 2017, *Overcoming catastrophic forgetting in neural networks*,
    arXiv 1612.00796), with the profile's diagonal :math:`F`. New parameters are free. It pulls the opposite way of
    guided dropout: vital parameters are held most.

    Attributes:
        strength: :math:`\lambda`, at least 0. Its scale is that of the Fisher information: choose it on training data.
    """

    strength: float = 1000.0
    needs: ClassVar[tuple[str, ...]] = ("profile",)

    def __post_init__(self) -> None:
        check_number("strength", self.strength, 0 <= self.strength < math.inf, "at least 0")

    def apply(self, model: nn.Module, context: Context) -> Handle:
        """Start from the weights that the model has now; see `Regularizer.apply`."""
        pretrained = pretrained_parameters(model, context)
        fisher = fisher_of(model, context.needed_profile("EWC"), "the pulls of EWC")
        pulls = [
            Pull(
                p,
                p.detach().clone(),
                self.strength * fisher[name].to(p.device, torch.promote_types(p.dtype, torch.float32)),
            )
            for name, p in pretrained.items()
            if name in fisher
        ]
        if not pulls:
            raise ModelError(
                f"the profile holds none of the trainable pretrained parameters of {type(model).__name__}, so that EWC "
                "pulls nothing; expected at least one: unfreeze a layer, or choose another regularizer"
            )
        return QuadraticPenalty(pulls, {"unmeasured": sorted(pretrained.keys() - fisher.keys())})
