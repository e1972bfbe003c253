"""Child-Tuning-D: only the parameters with the most Fisher information train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from guided_dropout.fisher.topk import select
from guided_dropout.regularizers.base import Context, Handle, Regularizer, check_number
from guided_dropout.regularizers.pretrained import fisher_of, measured_names, pretrained_parameters


@dataclass(frozen=True)
class ChildTuning(Regularizer):
    r"""Masks the gradients of all pretrained parameters but the share `p` with the most Fisher information.

    .. math:: \theta \leftarrow \theta - \eta\,\frac{\partial\mathcal L}{\partial\theta}\odot M,\qquad
        M_j = 1\ \text{where}\ F_j\ \text{is among the top}\ p,\ 0\ \text{elsewhere}

    (Child-Tuning-D of Xu et al., 2021, *Raise a Child in Large Language Model*, arXiv 2109.05687). The mask is drawn
    once from the profile, over all of the backbone, and stays; parameters outside of it are afterwards the pretrained
    ones, bit for bit, whatever the optimizer does (weight decay, momentum). New parameters, and those that the profile
    does not hold, train; those whose values the profile calls noise do not. The paper measures the Fisher information
    on the task's data; here it is what the profile was measured on.

    Attributes:
        p: share of the measured parameters that trains, in (0, 1].
    """

    p: float = 0.3
    needs: ClassVar[tuple[str, ...]] = ("profile",)

    def __post_init__(self) -> None:
        check_number("p", self.p, 0 < self.p <= 1, "a number above 0, up to 1")

    def apply(self, model: nn.Module, context: Context) -> Handle:
        """Start from the weights that the model has now; see `Regularizer.apply`."""
        pretrained = pretrained_parameters(model, context)
        profile = context.needed_profile("Child-Tuning")
        fisher = fisher_of(model, profile, "the gradient masks of Child-Tuning")
        measured = {name: fisher[name] for name in pretrained if name in fisher}
        there = measured_names(model, profile)
        noise = {name for name in measured if there[name] in profile.noise}
        child = select(measured, self.p, exclude=noise)
        frozen = [_Frozen(pretrained[name], mask) for name, mask in child.masks() if not bool(mask.all())]
        unmeasured = sorted(pretrained.keys() - fisher.keys())
        handle = Handle({"trained": child.count, "measured": child.num_ranked, "unmeasured": unmeasured})
        for part in frozen:
            handle.on_remove(part.parameter.register_hook(part.mask_gradient).remove)
        handle.on_remove(register_optimizer_step_post_hook(_after_step(frozen)).remove)
        return handle


class _Frozen:
    """A parameter of which only the elements in `mask` train."""

    def __init__(self, parameter: nn.Parameter, mask: Tensor):
        self.parameter = parameter
        self._mask = mask.to(parameter.device)
        self._start = parameter.detach().clone()

    def mask_gradient(self, gradient: Tensor) -> Tensor:
        return gradient * self._on(gradient.device)[0]

    def put_back(self) -> None:
        mask, start = self._on(self.parameter.device)
        self.parameter.data.copy_(torch.where(mask, self.parameter.data, start))

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._mask.device != device:  # the model has moved since
            self._mask, self._start = self._mask.to(device), self._start.to(device)
        return self._mask, self._start


def _after_step(frozen: list[_Frozen]) -> Callable[[Optimizer, Any, Any], None]:
    """Without it decoupled weight decay would move parameters that have no gradient."""

    def hook(optimizer: Optimizer, *_: Any) -> None:
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for part in frozen:
            if id(part.parameter) in stepped:
                part.put_back()

    return hook
