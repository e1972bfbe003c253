"""L2-SP: weight decay towards the pretrained weights instead of towards 0, the same everywhere or guided."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from guided_dropout.regularizers.base import Context, Handle, Regularizer, check_number
from guided_dropout.regularizers.penalty import Pull, QuadraticPenalty
from guided_dropout.regularizers.pretrained import new_parameters, pretrained_parameters, vital_of_adapters
from guided_dropout.regularizers.strengths import relative_strengths


@dataclass(frozen=True)
class L2SP(Regularizer):
    r"""Holds the pretrained parameters :math:`\theta_S` near their start and the new ones :math:`\theta_{\bar S}` at 0.

    What an adapter adds is new; where 0 would change what the model computes at the start (DoRA's magnitudes, IA3's
    scales, an adapter that was trained before) it is held near its start instead, with the same strength.

    .. math:: \Omega(\theta) = \frac\alpha2\,\lVert\theta_S-\theta_S^*\rVert_2^2
        + \frac\beta2\,\lVert\theta_{\bar S}\rVert_2^2

    is added to the loss (Li, Grandvalet & Davoine, 2018, *Explicit Inductive Bias for Transfer Learning with
    Convolutional Networks*, arXiv 1802.01483).

    Attributes:
        alpha: strength of the pull to the start, at least 0.
        beta: strength of plain L2 on the new parameters, at least 0.
    """

    alpha: float = 0.01
    beta: float = 0.01

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            check_number(name, value, 0 <= value < math.inf, "at least 0")

    def apply(self, model: nn.Module, context: Context) -> Handle:
        """Start from the weights that the model has now; see `Regularizer.apply`."""
        pretrained, new = pretrained_parameters(model, context), new_parameters(model, context)
        strengths = self._strengths(model, context)
        pulls = [Pull(p, p.detach().clone(), self.alpha * strengths.get(n, 1.0)) for n, p in pretrained.items()]
        kept = vital_of_adapters(model, context, new)
        pulls += [Pull(p, p.detach().clone() if n in kept else None, self.beta) for n, p in new.items()]
        return QuadraticPenalty(pulls, {"pretrained": len(pretrained), "new": sorted(new)})

    def _strengths(self, model: nn.Module, context: Context) -> Mapping[str, float]:
        return {}


@dataclass(frozen=True)
class GuidedL2SP(L2SP):
    r"""L2-SP whose strength follows a schedule: what the Fisher information calls vital is held less.

    .. math:: \Omega(\theta) = \frac\alpha2\sum_j \frac{p_{s(j)}}{\bar p}\,(\theta_j-\theta_j^*)^2
        + \frac\beta2\,\lVert\theta_{\bar S}\rVert_2^2,

    where :math:`p_{s(j)}` is the rate of the site that :math:`\theta_j` feeds and :math:`\bar p` the schedule's mean:
    the "information-guided" L2 that Sharma et al. (2024, section 2.3) describe before they choose dropout for it, made
    explicit. See `strengths.relative_strengths`.
    """

    needs: ClassVar[tuple[str, ...]] = ("schedule",)

    def _strengths(self, model: nn.Module, context: Context) -> Mapping[str, float]:
        return relative_strengths(model, context.needed_schedule("guided L2-SP"), context.inputs)
