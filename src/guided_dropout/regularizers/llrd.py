"""Layer-wise learning-rate decay: the nearer to the input, the smaller the steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from guided_dropout.regularizers.base import Context, Handle, Regularizer, check_known, check_number, itself
from guided_dropout.regularizers.layers import find_layers


@dataclass(frozen=True)
class LayerwiseDecay(Regularizer):
    r"""Gives each layer a learning rate that falls geometrically from the head down to the embeddings.

    .. math:: \eta_d = \eta\,\xi^{D-d}

    for depth d = 0 (embeddings) … D (head): discriminative fine-tuning (Howard & Ruder, 2018, section 3.2) in the form
    of ELECTRA (Clark et al., 2020). The depth is found by running the model, see `layers.find_layers`.

    Attributes:
        decay: :math:`\xi`, in (0, 1]; 1 is no decay.
    """

    decay: float = 0.9

    def __post_init__(self) -> None:
        check_number("decay", self.decay, 0 < self.decay <= 1, "a number above 0, up to 1")

    def apply(self, model: nn.Module, context: Context) -> Handle:
        """Acts on the optimizer's parameter groups; see `Regularizer.apply` and `Handle.parameter_groups`."""
        layers = find_layers(model, context.inputs)
        below = {id(p): layers.top - layers.depth[name] for name, p in model.named_parameters()}
        return _LayerwiseDecay(self.decay, below, {"depths": layers.top + 1, "blocks": list(layers.blocks)})


class _LayerwiseDecay(Handle):
    def __init__(self, decay: float, below: Mapping[int, int], facts: Mapping[str, Any]):
        super().__init__(facts)
        self._decay, self._below = decay, below

    def _parameter_groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        check_known(groups, self._below, "the layer-wise learning-rate decay")
        finer = []
        for group in groups:
            by_depth: dict[int, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                by_depth.setdefault(self._below.get(id(itself(parameter)), 0), []).append(parameter)
            # The head's first: the learning rate of the first group is the one that trainers log.
            finer += [
                {**group, "params": by_depth[below], "lr": group["lr"] * self._decay**below}
                for below in sorted(by_depth)
            ]
        return finer
