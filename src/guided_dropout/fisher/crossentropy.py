"""Cross-entropy whose gradient takes the place of the logits: with large vocabularies they are the peak of memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from guided_dropout.fisher import native
from guided_dropout.fisher.products import is_plain

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
        norm = _norms_by_kernel(logits) if _suits(logits, targets) else _norms(logits)
        ctx.logits, ctx.targets, ctx.norm = logits.detach(), targets, norm
        return norm - logits.gather(1, targets[:, None])[:, 0].to(norm.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        logits, targets, norm = ctx.logits, ctx.targets, ctx.norm
        del ctx.logits
        if _suits(logits, targets):
            _differentiate_by_kernel(logits, targets, norm, *gradients)
        else:
            _differentiate(logits, targets, norm, *gradients)
        return logits, None


def _norms(logits: Tensor) -> Tensor:
    """[M]: the logarithm of each row's sum of exponentials."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    parts = [chunk.to(wide).logsumexp(1) for chunk in logits.split(_rows_at_once(logits))]
    return torch.cat(parts) if parts else logits.new_zeros(0, dtype=wide)


def _differentiate(logits: Tensor, targets: Tensor, norm: Tensor, g: Tensor) -> None:
    """The losses' gradient, times `g` [M], in the logits' place."""
    size = _rows_at_once(logits)
    for s in range(0, len(logits), size):
        part = slice(s, s + size)
        chunk = logits[part].to(norm.dtype)  # float32 logits themselves, not a copy
        chunk.sub_(norm[part, None]).exp_()
        chunk.scatter_add_(1, targets[part, None], chunk.new_full((len(chunk), 1), -1.0))
        chunk.mul_(g[part, None])
        if chunk.dtype != logits.dtype:
            logits[part] = chunk.to(logits.dtype)


def _suits(logits: Tensor, targets: Tensor) -> bool:
    """Whether the C kernel takes it."""
    dense = logits.shape[1] > 0 and logits.stride(1) == 1 and targets.is_contiguous()
    return dense and is_plain(logits) and native.built()


def _norms_by_kernel(logits: Tensor) -> Tensor:
    found = logits.new_empty(len(logits), 2)
    kernel = native.library()
    assert kernel is not None
    at, (rows, width) = logits.data_ptr(), logits.shape
    kernel.exponential_sums(found.data_ptr(), at, logits.stride(0), rows, width, torch.get_num_threads())
    largest, sums = found.T
    return largest + sums.log()


def _differentiate_by_kernel(logits: Tensor, targets: Tensor, norm: Tensor, g: Tensor) -> None:
    kernel, scales = native.library(), g.contiguous()
    assert kernel is not None
    rows = [t.data_ptr() for t in (norm, scales, targets)]
    kernel.cross_entropy_gradient(logits.data_ptr(), logits.stride(0), *rows, *logits.shape, torch.get_num_threads())
    torch.autograd.graph.increment_version(logits)  # an activation that keeps its output must not use this for it


def _rows_at_once(logits: Tensor) -> int:
    elements = _CHUNK_ELEMENTS.get(logits.device.type, _CHUNK_ELEMENTS_ELSEWHERE)
    return max(1, elements // logits.shape[1])
