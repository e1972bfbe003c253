"""Attention in half precision, computed in float32 on a CPU, where torch's own, with its backward, takes longer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from guided_dropout.fisher.operations import replaced, tensors_of

_HALF = (torch.bfloat16, torch.float16)


class WideAttention(TorchFunctionMode):
    """Within, `scaled_dot_product_attention` of half-precision tensors on a CPU is run in float32 and rounded once."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query = tensors_of((args, kwargs))[0]
            if query.device.type == "cpu" and query.dtype in _HALF:
                args, kwargs = replaced((args, kwargs), _widened)
                return func(*args, **kwargs).to(query.dtype)
        return func(*args, **kwargs)


def _widened(t: Tensor) -> Tensor:
    return t.float() if t.dtype in _HALF else t
