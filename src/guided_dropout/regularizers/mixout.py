"""Mixout: dropout whose dropped weights become the pretrained ones instead of 0."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList
from transformers.pytorch_utils import Conv1D

from guided_dropout.errors import ModelError, SiteError
from guided_dropout.regularizers.base import Context, Handle, Regularizer, check_number
from guided_dropout.regularizers.forwards import is_replica, wrap_forward
from guided_dropout.regularizers.layers import parameters_in_order
from guided_dropout.regularizers.pretrained import pretrained_parameters


@dataclass(frozen=True)
class Mixout(Regularizer):
    r"""Each forward in training mode replaces a share of the weights by where they started, and corrects the mean.

    .. math:: \tilde W = \frac{M\odot W^* + (1-M)\odot W - p\,W^*}{1-p},\qquad M_{ij}\sim\mathrm{Bernoulli}(p),

    so that :math:`E[\tilde W]=W`; :math:`\tilde W=W^*` at p = 1 (Lee, Cho & Kang, 2020, *Mixout: Effective
    Regularization to Finetune Large-scale Pretrained Language Models*, arXiv 1909.11299). As in the authors' code, it
    acts on the pretrained weights of linear layers, and takes the place of dropout in the backbone. Those are the
    weights of ``nn.Linear`` and of transformers' ``Conv1D``, and parameters of three or more dimensions with more than
    one slice in the first, which hold several matrices (stacked experts; XLNet's projections, and its table of
    segments), unless they belong to a convolution or a parametrization. All else stays as it is: embeddings of tokens
    and positions, biases, norms, convolutions, new parameters.

    Attributes:
        p: share of the weights that is replaced, in [0, 1].
    """

    p: float = 0.7
    holds_weights: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number("p", self.p, 0 <= self.p <= 1, "a number from 0 to 1")

    def apply(self, model: nn.Module, context: Context) -> Handle:
        """Start from the weights that the model has now; see `Regularizer.apply`."""
        pretrained = pretrained_parameters(model, context)
        mixed = {
            name: parameter
            for name, parameter in pretrained.items()
            if _is_linear(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], parameter)
        }
        if not mixed:
            raise ModelError(
                f"none of the trainable pretrained parameters of {type(model).__name__} is the weight of a linear "
                "layer, so that mixout mixes nothing; expected at least one: unfreeze a layer, or choose another arm"
            )
        handle = Handle({"mixed": len(mixed), "untouched": len(pretrained) - len(mixed)})
        handle.whole_batches = 0 < self.p < 1
        targets = {id(parameter): parameter.detach().clone() for parameter in mixed.values()}
        holders: dict[nn.Module, dict[str, Tensor]] = {}  # each module that shares a weight, and each module once
        for module in model.modules():
            held = {name: targets[id(p)] for name, p in module._parameters.items() if id(p) in targets}
            if held:
                holders[module] = held
        _check_reached(model, context, holders)
        for module, held in holders.items():
            wrap_forward(handle, module, partial(_mixed, targets=held, p=self.p))
        return handle


def mixout(weight: Tensor, target: Tensor, p: float) -> Tensor:
    """One draw of `Mixout`'s mixed weights; any shape, the gradient goes to `weight`."""
    if p == 0:
        return weight
    if p == 1:
        return target + 0 * weight  # a gradient of 0, not none
    # In this form the weights stay what they are, bit for bit, where they have not moved.
    kept = torch.empty_like(weight).bernoulli_(1 - p) / (1 - p)
    return target + kept * (weight - target)


def _is_linear(owner: nn.Module, name: str, parameter: Tensor) -> bool:
    if isinstance(owner, nn.Linear | Conv1D):
        return name == "weight"
    # One slice alone is an embedding that broadcasts over the batch, as a ViT's positions.
    return parameter.dim() > 2 and len(parameter) > 1 and not isinstance(owner, _ConvNd | ParametrizationList)


@contextlib.contextmanager
def _mixed(module: nn.Module, targets: dict[str, Tensor], p: float) -> Iterator[None]:
    """Let the module compute with mixed weights; its parameters are its own again afterwards."""
    place: dict[str, Any] = vars(module) if is_replica(module) else module._parameters
    own = {name: place[name] for name in targets}
    for name, weight in own.items():
        target = targets[name].to(weight)
        if not is_replica(module):  # the model may have moved, or changed its precision, since
            targets[name] = target
        place[name] = mixout(weight, target, p)
    try:
        yield
    finally:
        place.update(own)


def _check_reached(model: nn.Module, context: Context, holders: dict[nn.Module, dict[str, Tensor]]) -> None:
    """A weight that is used without a call of any module that holds it would never be mixed."""
    called: set[nn.Module] = set()
    hooks = [module.register_forward_pre_hook(lambda module, *_: called.add(module)) for module in holders]
    try:
        used = parameters_in_order(model, context.inputs)
    finally:
        for hook in hooks:
            hook.remove()
    by_parameter: dict[int, list[nn.Module]] = {}
    for module, held in holders.items():
        for name in held:
            by_parameter.setdefault(id(module._parameters[name]), []).append(module)
    for name in used:
        if (own := by_parameter.get(id(model.get_parameter(name)))) and not called.intersection(own):
            raise SiteError(
                f"{name} is used without a call of its module, where mixout would not reach it; expected weights that "
                "belong to the layer that uses them: choose another model or arm"
            )
