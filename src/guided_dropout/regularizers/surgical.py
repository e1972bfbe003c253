"""Surgical fine-tuning: only the layers with the most Fisher information train."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from guided_dropout.regularizers.base import Context, Handle, Regularizer, check_number
from guided_dropout.regularizers.layers import find_layers
from guided_dropout.regularizers.pretrained import measured_names, new_names


@dataclass(frozen=True)
class Surgical(Regularizer):
    r"""Trains the layers with the highest Fisher score and what is new; the rest of the backbone is frozen.

    .. math:: S_l = \frac1{|\theta_l|}\sum_{j\in l}F_j;\qquad\text{the}\ \lceil q L\rceil\ \text{layers of highest}\
        S_l\ \text{train}

    (Lodha et al., 2023, *On Surgical Fine-tuning for Language Encoders*, arXiv 2310.17041). A layer is a block of the
    backbone's stack, with its adapters; embeddings, final norms and a pretrained pooler are frozen. The paper measures
    the Fisher information on the task's data; here it is what the profile was measured on.

    Attributes:
        share: q, the share of the layers that trains, in (0, 1].
    """

    share: float = 0.25
    needs: ClassVar[tuple[str, ...]] = ("profile",)

    def __post_init__(self) -> None:
        check_number("share", self.share, 0 < self.share <= 1, "a number above 0, up to 1")

    def apply(self, model: nn.Module, context: Context) -> Handle:
        """Freeze the rest; see `Regularizer.apply`."""
        profile = context.needed_profile("surgical fine-tuning")
        names = measured_names(model, profile)
        layers = find_layers(model, context.inputs)
        scores = {}
        for path in layers.blocks:
            held = {there for name, there in names.items() if layers.block_of.get(name) == path}
            sizes = {there: math.prod(profile.shapes[there]) for there in held.difference(profile.noise)}
            total = math.fsum(size * profile.tensor_means[there] for there, size in sizes.items())
            scores[path] = total / max(1, sum(sizes.values()))
        number = math.ceil(Fraction(str(self.share)) * len(scores))  # in floats .28 of 25 is a little above 7
        trained = sorted(sorted(scores, key=lambda path: -scores[path])[:number])
        handle, new, frozen = Handle({"trained": trained, "scores": scores}), new_names(model, context), []
        for name, parameter in model.named_parameters():
            kept = name in new or layers.block_of.get(name) in trained
            if parameter.requires_grad and not kept:  # what is frozen already is not this handle's to give back
                handle.on_remove(parameter.requires_grad_, True)
                handle.on_remove(parameter.register_hook(torch.zeros_like).remove)
                parameter.requires_grad_(False)
                frozen.append(parameter)
        handle.on_remove(register_optimizer_step_pre_hook(partial(_freeze_again, frozen)).remove)
        return handle


def _freeze_again(frozen: Iterable[nn.Parameter], *_: Any) -> None:
    """PEFT lets all of its parameters train at the end of each ``disable_adapter()``; no optimizer may move these."""
    for parameter in frozen:
        parameter.requires_grad_(False)
        parameter.grad = None
