"""A quadratic term in the loss that pulls parameters towards where they should stay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from guided_dropout.regularizers.base import Handle


@dataclass
class Pull:
    """One parameter's term.

    Attributes:
        parameter: any shape.
        target: of the same shape; None for 0.
        weight: one number, or a tensor of the same shape.
    """

    parameter: nn.Parameter
    target: Tensor | None
    weight: float | Tensor

    def term(self) -> Tensor:
        r""":math:`\sum_j w_j(\theta_j-\theta^*_j)^2`, a scalar."""
        self._follow()
        distance = self.parameter if self.target is None else self.parameter - self.target
        wide = torch.promote_types(distance.dtype, torch.float32)  # squares and Fisher values may be 0 in float16
        return (self.weight * distance.to(wide).square()).sum()

    def _follow(self) -> None:
        """The model may have moved to another device since."""
        device = self.parameter.device
        if self.target is not None and self.target.device != device:
            self.target = self.target.to(device)
        if isinstance(self.weight, Tensor) and self.weight.device != device:
            self.weight = self.weight.to(device)


class QuadraticPenalty(Handle):
    r"""Adds :math:`\frac12\sum_j w_j(\theta_j-\theta^*_j)^2` to the loss of each training batch."""

    def __init__(self, pulls: Iterable[Pull], facts: Mapping[str, Any] | None = None):
        super().__init__(facts)
        self._pulls = list(pulls)

    def penalty(self) -> Tensor:
        """The term, a scalar with a gradient."""
        return 0.5 * torch.stack([pull.term() for pull in self._pulls]).sum()

    def _loss(self, loss: Tensor, model: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> Tensor:
        return loss + self.penalty()
