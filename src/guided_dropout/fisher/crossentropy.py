"""Cross-entropy whose gradient takes the place of the logits: with large vocabularies they are the peak of memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Of temporaries, in float32: 2 MB on a CPU; on a GPU, where a launch costs more than the memory, 256 MB.
_CHUNK_ELEMENTS = {"cpu": 1 << 19}
_CHUNK_ELEMENTS_ELSEWHERE = 1 << 26


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    r""":math:`-\log \operatorname{softmax}(z)_y` in nats, in float32 or better.

    The backward overwrites `logits`; nobody may read them after it.

    Args:
        logits: [M, V].
        targets: [M] int64, each in 0 … V−1.

    Returns:
        [M]
    """
    return _CrossEntropy.apply(logits, targets)  # pyright: ignore[reportReturnType]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        chunks = logits.split(_rows_at_once(logits))
        wide = torch.promote_types(logits.dtype, torch.float32)
        parts = [chunk.to(wide).logsumexp(1) for chunk in chunks]
        norm = torch.cat(parts) if parts else logits.new_zeros(0, dtype=wide)
        ctx.logits, ctx.targets, ctx.norm = logits.detach(), targets, norm
        return norm - logits.gather(1, targets[:, None])[:, 0].to(wide)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (g,) = gradients
        logits, targets, norm = ctx.logits, ctx.targets, ctx.norm
        del ctx.logits
        size = _rows_at_once(logits)
        for s in range(0, len(logits), size):
            part = slice(s, s + size)
            chunk = logits[part].to(norm.dtype)  # float32 logits themselves, not a copy
            chunk.sub_(norm[part, None]).exp_()
            chunk.scatter_add_(1, targets[part, None], chunk.new_full((len(chunk), 1), -1.0))
            chunk.mul_(g[part, None])
            if chunk.dtype != logits.dtype:
                logits[part] = chunk.to(logits.dtype)
        return logits, None


def _rows_at_once(logits: Tensor) -> int:
    elements = _CHUNK_ELEMENTS.get(logits.device.type, _CHUNK_ELEMENTS_ELSEWHERE)
    return max(1, elements // logits.shape[1])
