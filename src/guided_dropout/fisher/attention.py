"""Attention on a CPU by the C kernel, forward and backward; in half precision it is computed in float32.

torch's own takes longer, in half precision much longer (docs/architecture.md).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from guided_dropout.fisher import native
from guided_dropout.fisher.heads import Mask, attention, attention_gradients
from guided_dropout.fisher.operations import replaced, tensors_of
from guided_dropout.fisher.products import is_plain

_HALF = (torch.bfloat16, torch.float16)


class OwnAttention(TorchFunctionMode):
    """Within, `scaled_dot_product_attention` on a CPU is run by the kernel, or in float32, where either is faster."""

    def __init__(self) -> None:
        super().__init__()
        self._masks: dict[tuple[int, int], tuple[Tensor, int, Mask]] = {}  # layers share theirs
        self._causal: dict[tuple[int, int], Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        call = _bound(*args, **kwargs)
        if any(t.device.type != "cpu" for t in tensors_of(call)):
            return func(*args, **kwargs)
        dtype = call.query.dtype
        if _suits(call):
            return _Attention.apply(*call.heads(), self._mask_of(call), call.scale).to(dtype)
        args, kwargs = replaced((args, kwargs), _widened)
        return func(*args, **kwargs).to(dtype)

    def _mask_of(self, call: _Call) -> Mask | None:
        mask, queries, keys = call.attn_mask, call.query.shape[2], call.key.shape[2]
        if call.is_causal:
            if (queries, keys) not in self._causal:
                self._causal[queries, keys] = torch.ones(queries, keys, dtype=torch.bool, device="cpu").tril()
            mask = self._causal[queries, keys]
        if mask is None:
            return None
        key = id(mask), queries
        found = self._masks.get(key)
        if found is None or found[1] != mask._version:
            found = self._masks[key] = (mask, mask._version, Mask.of(mask, queries))
        return found[2]


class _Call(NamedTuple):
    """Arguments of `scaled_dot_product_attention`; queries [B, H, T, d], keys and values [B, H or fewer, S, d]."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    dropout_p: float
    is_causal: bool
    scale: float
    enable_gqa: bool

    def heads(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values in float32, as many heads of each."""
        q, k, v = map(_widened, self[:3])
        groups = q.shape[1] // k.shape[1]
        return (q, k, v) if groups == 1 else (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))


def _bound(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> _Call:
    usual = max(query.shape[-1], 1) ** -0.5
    return _Call(query, key, value, attn_mask, dropout_p, is_causal, usual if scale is None else scale, enable_gqa)


def _suits(call: _Call) -> bool:
    """Whether the kernel takes it."""
    q, k, v = given = call[:3]
    if any(t.dim() != 4 or not is_plain(t, torch.float32, *_HALF) or 0 in t.shape for t in given):
        return False
    if k.shape != v.shape or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        return False
    if q.shape[1] != k.shape[1] and not (call.enable_gqa and q.shape[1] % k.shape[1] == 0):
        return False
    return not call.dropout_p and _suits_as_mask(call) and native.built()


def _suits_as_mask(call: _Call) -> bool:
    """Whether there is none, or one that all heads share and that is not learnt."""
    mask, (batch, _, queries, _), keys = call.attn_mask, call.query.shape, call.key.shape[2]
    if mask is None:
        return True
    sizes = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    shared = len(sizes) == 4 and sizes[0] in (1, batch) and sizes[1:] in ((1, queries, keys), (1, 1, keys))
    return (
        shared and is_plain(mask, torch.bool, torch.float32, *_HALF) and not mask.requires_grad and not call.is_causal
    )


def _widened(t: Tensor) -> Tensor:
    return t.float() if t.dtype in _HALF else t


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, scale: float) -> Tensor:
        out, kept = attention(q, k, v, mask, scale)
        ctx.save_for_backward(q, k, v, out, kept)
        ctx.mask, ctx.scale = mask, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, kept = ctx.saved_tensors
        return *attention_gradients(q, k, v, out, kept, gradient, ctx.mask, ctx.scale), None, None
