"""Guided weight decay: the same mean over the dropout sites, more of it where the Fisher information is low."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from guided_dropout.errors import GuidedDropoutError
from guided_dropout.regularizers.base import Context, Handle, Regularizer, check_known, itself
from guided_dropout.regularizers.strengths import relative_strengths


@dataclass(frozen=True)
class GuidedDecay(Regularizer):
    r"""Spreads the optimizer's decoupled weight decay :math:`\lambda` over the layers as a schedule does dropout.

    .. math:: \theta_j \leftarrow \bigl(1 - \eta\,\lambda_j\bigr)\,\theta_j - \eta\,u_j,\qquad
        \lambda_j = \lambda\,\frac{p_{s(j)}}{\bar p},

    with AdamW's step :math:`u` (Loshchilov & Hutter, 2019), :math:`p_{s(j)}` the rate of the site that :math:`\theta_j`
    feeds and :math:`\bar p` the schedule's mean. By eqs. 9-10 of Sharma et al. (2024) :math:`p` falls with the rank of
    the Fisher score, so that vital layers decay less: their "information-guided" L2, taken at its word. The control is
    the same optimizer's decay without it; the mean is the same over the sites, not over the parameters, of which sites
    have more and fewer. Parameters that do not decay otherwise (biases, norms) do not here.
    """

    needs: ClassVar[tuple[str, ...]] = ("schedule",)

    def apply(self, model: nn.Module, context: Context) -> Handle:
        """Acts on the optimizer's parameter groups; see `Regularizer.apply` and `Handle.parameter_groups`."""
        strengths = relative_strengths(model, context.needed_schedule("guided weight decay"), context.inputs)
        return _GuidedDecay({id(p): strengths[name] for name, p in model.named_parameters()})


class _GuidedDecay(Handle):
    def __init__(self, strengths: Mapping[int, float]):
        super().__init__({"strengths": sorted(set(strengths.values()))})
        self._strengths = strengths

    def _parameter_groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if not any(group["weight_decay"] for group in groups):
            raise GuidedDropoutError(
                "guided weight decay has no weight decay to spread, it is 0; expected more than 0: set weight_decay"
            )
        check_known(groups, self._strengths, "guided weight decay")
        finer = []
        for group in groups:
            by_strength: dict[float, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                strength = self._strengths.get(id(itself(parameter)), 1.0) if group["weight_decay"] else 1.0
                by_strength.setdefault(strength, []).append(parameter)
            finer += [
                {**group, "params": params, "weight_decay": group["weight_decay"] * strength}
                for strength, params in by_strength.items()
            ]
        return finer
