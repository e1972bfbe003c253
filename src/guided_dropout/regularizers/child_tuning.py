"""Child-Tuning-D: only the parameters with the most Fisher information train."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from guided_dropout.regularizers.base import Context, Handle, Regularizer, check_number
from guided_dropout.regularizers.pretrained import fisher_of, pretrained_parameters


@dataclass(frozen=True)
class ChildTuning(Regularizer):
    r"""Masks the gradients of all pretrained parameters but the share `p` with the most Fisher information.

    .. math:: \theta \leftarrow \theta - \eta\,\frac{\partial\mathcal L}{\partial\theta}\odot M,\qquad
        M_j = 1\ \text{where}\ F_j\ \text{is among the top}\ p,\ 0\ \text{elsewhere}

    (Child-Tuning-D of Xu et al., 2021, *Raise a Child in Large Language Model*, arXiv 2109.05687). The mask is drawn
    once from the profile, over all of the backbone, and stays; parameters outside of it are afterwards the pretrained
    ones, bit for bit, whatever the optimizer does (weight decay, momentum). New parameters, and those that the profile
    does not hold, train. The paper measures the Fisher information on the task's data; here it is what the profile was
    measured on.

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
        fisher = fisher_of(model, context.needed_profile("Child-Tuning"))
        measured = {name: fisher[name] for name in pretrained if name in fisher}
        masks = top_masks(measured, self.p)
        frozen = [_Frozen(pretrained[name], masks[name]) for name in measured if not bool(masks[name].all())]
        handle = Handle(
            {
                "trained": sum(int(mask.sum()) for mask in masks.values()),
                "measured": sum(mask.numel() for mask in masks.values()),
                "unmeasured": sorted(pretrained.keys() - fisher.keys()),
            }
        )
        for part in frozen:
            handle.on_remove(part.parameter.register_hook(part.mask_gradient).remove)
        handle.on_remove(register_optimizer_step_post_hook(_after_step(frozen)).remove)
        return handle


def top_masks(values: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Boolean masks of the `share` of all elements, over all tensors, with the largest values.

    The number of elements is ``round(share * total)``, at least 1; of equal values at the edge the first ones, in the
    order of the mapping.
    """
    flat = torch.cat([value.flatten() for value in values.values()])
    number = max(1, round(share * flat.numel()))
    edge = flat.kthvalue(flat.numel() - number + 1).values
    mask, ties = flat > edge, flat == edge
    mask |= ties & (ties.cumsum(0) <= number - mask.sum())
    parts = mask.split([value.numel() for value in values.values()])
    return {name: part.view(value.shape) for (name, value), part in zip(values.items(), parts, strict=True)}


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
