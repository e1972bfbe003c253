r"""The oracle: the diagonal empirical Fisher one sample at a time, by plain autograd.

Slow and obviously right: run one unpadded sample, differentiate its loss, square, add. The fast estimator is tested
against this in float64, checks its first samples with it, and hands it the parameters that no rule covers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from guided_dropout.objectives import Objective, Sample


def sum_of_squares(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], samples: Iterable[Sample], objective: Objective
) -> dict[str, Tensor]:
    r"""The sums :math:`\sum_i (\partial\ell_i/\partial\theta_j)^2` for the given parameters.

    Args:
        model: in evaluation mode, with `parameters` requiring gradients.
        parameters: name → parameter.
        samples: each is run alone and without padding.
        objective: the loss.

    Returns:
        name → tensor of the parameter's shape; float64 for float64 parameters, else float32.
    """
    sums = {n: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for n, p in parameters.items()}
    for sample in samples:
        batch = objective.collate(model, [sample])
        loss = objective.losses(model(**batch.inputs).logits, batch).sum()
        if not loss.requires_grad:  # experts that this sample does not reach
            continue
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for total, grad in zip(sums.values(), grads, strict=True):
            if grad is not None:
                total += grad.to(total.dtype).square()
    return sums
