"""R-Drop: two draws of dropout must agree."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from guided_dropout.errors import ModelError
from guided_dropout.regularizers.base import Context, Handle, Regularizer, check_number


@dataclass(frozen=True)
class RDrop(Regularizer):
    r"""Runs each training batch twice, under two draws of dropout, and adds how much the predictions differ.

    .. math:: \mathcal L = \tfrac12(\mathcal L_1+\mathcal L_2)
        + \frac\alpha2\bigl[D_{KL}(P_1\Vert P_2)+D_{KL}(P_2\Vert P_1)\bigr]

    averaged over the batch (Wu et al., 2021, *R-Drop: Regularized Dropout for Neural Networks*, arXiv 2106.14448).
    Their eq. 4, and their code for GLUE, have the sum of the two losses, the outline in their repository has the mean,
    as here: eq. 4 is twice this loss at twice this :math:`\alpha`. For a regression the mean squared difference takes
    the place of the divergences, as in their code. A step takes twice the time. Other models than classifiers of whole
    examples into one of several classes, and regressions, are refused: several labels at once are no distribution, and
    a prediction for each token would count padding.

    Attributes:
        alpha: :math:`\alpha`, at least 0.
    """

    alpha: float = 1.0
    holds_weights: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, 0 <= self.alpha < math.inf, "at least 0")

    def apply(self, model: nn.Module, context: Context) -> Handle:
        """Acts on the loss; see `Regularizer.apply` and `Handle.loss`."""
        _check_one_label(model)
        return _RDrop(self.alpha)


class _RDrop(Handle):
    def __init__(self, alpha: float):
        super().__init__()
        self._alpha = alpha

    def _loss(self, loss: Tensor, model: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> Tensor:
        _check_one_label(model)  # transformers sees from the first labels what kind of a problem it is
        again = model(**inputs)
        first, second = _logits(outputs), _logits(again)
        other = again["loss"] if isinstance(again, Mapping) else again[0]
        return (loss + other) / 2 + self._alpha * disagreement(first, second)


def disagreement(first: Tensor, second: Tensor) -> Tensor:
    """Half the symmetric KL divergence of two predictions in nats; of single numbers their squared difference.

    Args:
        first: logits [batch, classes], or [batch, 1] for a regression.
        second: the same.

    Returns:
        The mean over the batch, a scalar.
    """
    if first.shape[-1] == 1:
        return F.mse_loss(first, second)
    a, b = F.log_softmax(first, dim=-1), F.log_softmax(second, dim=-1)
    # KL(a|b) + KL(b|a) = sum (a - b)(e^a - e^b)
    return 0.5 * ((a - b) * (a.exp() - b.exp())).sum(-1).mean()


def _check_one_label(model: nn.Module) -> None:
    if getattr(getattr(model, "config", None), "problem_type", None) == "multi_label_classification":
        raise ModelError(
            f"R-Drop on {type(model).__name__} whose problem_type is multi_label_classification, where the predictions "
            "are no distribution over the labels; expected one label an example: choose another regularizer"
        )


def _logits(outputs: Any) -> Tensor:
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    if logits is None:
        raise ModelError("R-Drop found no logits in the model's outputs; expected a classifier that returns a dict")
    if logits.dim() != 2:
        raise ModelError(
            f"R-Drop found logits of shape {list(logits.shape)}; expected [batch, labels], one prediction an example: "
            "choose another regularizer for a model that predicts each token"
        )
    return logits
