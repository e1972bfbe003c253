"""Softmax attention by the C kernel (``attention.h``), for what `attention` finds to suit it."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from guided_dropout.fisher import native

_QUERIES = 32  # of a block, as in the kernel


@dataclass(frozen=True)
class Mask:
    """What is added to the scores, as the kernel reads it.

    Attributes:
        values: [M, blocks of queries, S, 32] float32; M is 1 or the number of samples.
        spans: [M, blocks of queries, 2] int64: the keys between these are those that a block sees.
    """

    values: Tensor
    spans: Tensor

    @classmethod
    def of(cls, mask: Tensor, queries: int) -> Mask:
        """Of one that broadcasts to [M, 1, T, S]: bool, true where a key is seen, or what is added in floating point.

        Args:
            mask: the mask.
            queries: T.
        """
        mask = mask[(None,) * (4 - mask.dim())][:, 0].expand(-1, queries, -1)
        if mask.dtype == torch.bool:
            mask = mask.new_zeros(mask.shape, dtype=torch.float32).masked_fill_(~mask, -torch.inf)
        rows = F.pad(mask.float(), (0, 0, 0, -mask.shape[1] % _QUERIES), value=-torch.inf)
        values = rows.unflatten(1, (-1, _QUERIES)).mT.contiguous()
        seen, key = (values != -torch.inf).any(-1), torch.arange(mask.shape[2], device="cpu")
        end = (seen * (key + 1)).amax(-1)
        start = torch.minimum(len(key) - (seen * (len(key) - key)).amax(-1), end)
        return cls(values, torch.stack([start, end], -1))


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, scale: float) -> tuple[Tensor, Tensor]:
    r""":math:`\operatorname{softmax}(s\, Q K^\top + M) V` of each head; zero for a query that sees no key.

    Args:
        q: [B, H, T, d] float32 on a CPU; nothing of it is empty.
        k: [B, H, S, d], as `v`.
        v: the values.
        mask: M.
        scale: s.

    Returns:
        [B, H, T, d], in memory as [B, T, H, d]; and what the gradients need, [B, H, T, 2].
    """
    out, kept = _like(q), q.new_empty(*q.shape[:3], 2)
    _run({"q": q, "k": k, "v": v, "out": out}, kept, mask, scale)
    return out, kept


def attention_gradients(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Tensor, gradient: Tensor, mask: Mask | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of `q`, `k` and `v`, from that of `out`."""
    found = _like(q), _like(k), _like(v)
    inputs = {"q": q, "k": k, "v": v, "out": out, "dout": gradient}
    _run(inputs | dict(zip(("dq", "dk", "dv"), found, strict=True)), kept, mask, scale)
    return found


def _like(x: Tensor) -> Tensor:
    _, heads, rows, width = x.shape
    return x.new_empty_strided(x.shape, (rows * heads * width, width, heads * width, 1))  # a view could not be changed


class _Operand(ctypes.Structure):
    _fields_ = (
        ("at", ctypes.c_void_p),
        ("sample", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("row", ctypes.c_int64),
    )


class _Problem(ctypes.Structure):
    _fields_ = (
        *((name, _Operand) for name in ("q", "k", "v", "out", "dq", "dk", "dv", "dout")),
        *((name, ctypes.c_void_p) for name in ("kept", "mask", "spans")),
        *((name, ctypes.c_int64) for name in ("masks", "samples", "heads", "queries", "keys", "width")),
        ("scale", ctypes.c_float),
    )


def _run(operands: dict[str, Tensor], kept: Tensor, mask: Mask | None, scale: float) -> None:
    """The kernel, backward where there is a gradient."""
    kernel = native.library()
    assert kernel is not None
    # Outputs are dense already; a copy of an input lives until the kernel is done.
    dense = {name: t if t.stride(3) == 1 else t.contiguous() for name, t in operands.items()}
    problem = _Problem(**{name: _Operand(t.data_ptr(), *t.stride()[:3]) for name, t in dense.items()})
    samples, heads, queries, width = operands["q"].shape
    problem.samples, problem.heads, problem.queries, problem.width = samples, heads, queries, width
    problem.keys, problem.kept, problem.scale = operands["k"].shape[2], kept.data_ptr(), scale
    if mask is not None:
        problem.mask, problem.spans, problem.masks = mask.values.data_ptr(), mask.spans.data_ptr(), len(mask.values)
    if kernel.attend(ctypes.byref(problem), "dout" in operands, torch.get_num_threads()):
        raise MemoryError("no memory for the kernel's buffers")
