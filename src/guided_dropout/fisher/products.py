"""Products with a model's matrices, in AMX where that is faster than torch's own.

Beside its squares a Fisher's time goes to these: each linear layer's output, and the gradient of its input. Float32
goes through AMX in two pieces of 8 bits, as in the squares (`amx.h`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guided_dropout.fisher import native

# Fewer rows do not make up for packing the matrix, measured; narrow matrices are padded to whole tiles.
_LEAST_ROWS = 96
_LEAST_WIDTH = 64
# Listed rows that are copied at a time, where they have to be.
_AT_ONCE = 1024


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` without a graph: x [..., k], weight [n, k], bias [n] → [..., n]."""
    if _goes_through_amx(x, weight, bias):
        return native.multiply(x.reshape(-1, x.shape[-1]), weight.T, bias).view(*x.shape[:-1], len(weight))
    return F.linear(x, weight, bias)


def times(rows: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """``rows @ matrix + bias`` without a graph: rows [R, k], matrix [k, n], bias [n] → [R, n]."""
    if _goes_through_amx(rows, matrix, bias):
        return native.multiply(rows, matrix, bias)
    return rows @ matrix if bias is None else torch.addmm(bias, rows, matrix)


def listed_times(rows: Tensor, listed: Tensor, matrix: Tensor) -> Tensor:
    """``rows @ matrix``, of which the rows numbered `listed` [K] int64, ascending, alone are formed; zero elsewhere."""
    if _goes_through_amx(rows, matrix, None, len(listed)):
        return native.multiply(rows, matrix, listed=listed)
    out = rows.new_zeros(len(rows), matrix.shape[1])
    for some in listed.split(_AT_ONCE):
        out.index_copy_(0, some, rows.index_select(0, some) @ matrix)
    return out


def _goes_through_amx(x: Tensor, matrix: Tensor, bias: Tensor | None, number: int | None = None) -> bool:
    number = x.shape[:-1].numel() if number is None else number
    if min(matrix.shape) < _LEAST_WIDTH or number < _LEAST_ROWS or (bias is not None and bias.dim() > 1):
        return False
    given = [x, matrix] if bias is None else [x, matrix, bias]
    return all(map(is_plain, given)) and native.has_amx()


def is_plain(t: Tensor, *dtypes: torch.dtype) -> bool:
    """Whether it is here and of one of these types, by default float32, each element where its strides say."""
    # Others may hold their elements elsewhere: sparse ones, quantised ones, those spread over devices.
    here = t.dtype in (dtypes or (torch.float32,)) and t.device.type == "cpu"
    return here and t.layout == torch.strided and type(t) in (Tensor, nn.Parameter)
