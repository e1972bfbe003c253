r"""Squares of per-sample gradients on a GPU: each sample's gradient lives and dies in registers.

For a matrix with per-sample gradients :math:`G_b = \sum_{t \in b} l_t r_t^\top` (`squares.Outer`), one program owns a
tile of the matrix: it walks over the samples, forms the tile of :math:`G_b` on the tensor cores, squares it, and writes
once at the end, so that squaring per sample costs no memory traffic beyond a plain weight gradient's.

The walk is one loop over *chunks*, blocks of rows that never span two samples, rather than a loop over rows within one
over samples: loads then run ahead across the samples' ends. Sums are formed in a fixed order, without atomics.

Importing this needs Triton, which PyTorch for CUDA brings along. Set ``TRITON_INTERPRET=1`` before Triton is first
imported to run the same kernels on a CPU, slowly.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from guided_dropout.fisher.chunks import Walk, block_rows, ceil_div, num_splits, walk_of

INTERPRETED = knobs.runtime.interpret
PRECISIONS = ("tf32x3", "ieee", "tf32", "bf16x6")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Two float32 tiles, a sample's gradient and the squares, take half of a thread's registers, so that nothing spills; one
# stage of the pipeline goes to the chunk table.
CONFIGS = [
    triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages)
    for m, n, warps, stages in [
        (128, 128, 8, 5),
        (128, 128, 8, 6),
        (64, 128, 8, 5),
        (128, 64, 8, 5),
        (64, 64, 4, 6),
    ]
]
_SMALL = triton.Config({"BLOCK_M": 16, "BLOCK_N": 16})


@triton.jit
def _tile_origin(m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Row and column of this program's tile; eight rows of tiles at a time, so that what they read stays in L2."""
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    band, within = tl.program_id(0) // (8 * tiles_n), tl.program_id(0) % (8 * tiles_n)
    height = tl.minimum(tiles_m - 8 * band, 8)
    return (8 * band + within % height) * BLOCK_M, (within // height) * BLOCK_N


@triton.jit
def _add_chunk(
    gradient, left, right, chunk, m, n, i, j, left_stride, right_stride, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr
):
    """`gradient` + the products of a chunk's rows, at rows i and columns j of the matrix."""
    first = tl.load(chunk).to(tl.int64)
    t = tl.arange(0, BLOCK_K)
    inside = t < tl.load(chunk + 1)
    x = tl.load(
        left + first * left_stride + (t.to(tl.int64)[None, :] * left_stride + i[:, None]),
        mask=(i < m)[:, None] & inside[None, :],
        other=0.0,
    )
    y = tl.load(
        right + first * right_stride + (t.to(tl.int64)[:, None] * right_stride + j[None, :]),
        mask=inside[:, None] & (j < n)[None, :],
        other=0.0,
    )
    return tl.dot(x, y, gradient, input_precision=PRECISION)


@triton.jit(do_not_specialize=["length"])
def _squares(
    out,  # [splits, m, n] float32
    left,  # [R, m]
    right,  # [R, n]
    chunks,  # [C, 4] int32: first row, number of rows, whether the sample ends here, sample
    bounds,  # [splits + 1] int32: the chunks of each split
    m,
    n,
    left_stride,
    right_stride,
    out_stride,
    split_stride,
    length,  # how many chunks a sample has, for the tuner alone
    ADD: tl.constexpr,  # whether to add to what stands in out
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    i0, j0 = _tile_origin(m, n, BLOCK_M, BLOCK_N)  # pyright: ignore[reportGeneralTypeIssues]
    i, j = i0 + tl.arange(0, BLOCK_M), j0 + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    squares = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    gradient = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for c in tl.range(tl.load(bounds + split), tl.load(bounds + split + 1)):
        chunk = chunks + 4 * c
        gradient = _add_chunk(
            gradient, left, right, chunk, m, n, i, j, left_stride, right_stride, BLOCK_K, PRECISION
        )  # fmt: skip
        if tl.load(chunk + 2) != 0:
            squares += gradient * gradient
            gradient = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    at = out + split.to(tl.int64) * split_stride + (i.to(tl.int64)[:, None] * out_stride + j[None, :])
    mask = (i < m)[:, None] & (j < n)[None, :]
    if ADD:
        squares += tl.load(at, mask=mask, other=0.0)
    tl.store(at, squares, mask=mask)


@triton.jit(do_not_specialize=["length"])
def _square_sums(
    out,  # [B, tiles or more] float32
    left,
    right,
    chunks,
    bounds,
    m,
    n,
    left_stride,
    right_stride,
    out_stride,
    length,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    i0, j0 = _tile_origin(m, n, BLOCK_M, BLOCK_N)  # pyright: ignore[reportGeneralTypeIssues]
    i, j = i0 + tl.arange(0, BLOCK_M), j0 + tl.arange(0, BLOCK_N)
    gradient = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for c in tl.range(tl.load(bounds + tl.program_id(1)), tl.load(bounds + tl.program_id(1) + 1)):
        chunk = chunks + 4 * c
        gradient = _add_chunk(
            gradient, left, right, chunk, m, n, i, j, left_stride, right_stride, BLOCK_K, PRECISION
        )  # fmt: skip
        if tl.load(chunk + 2) != 0:
            at = tl.load(chunk + 3).to(tl.int64) * out_stride + tl.program_id(0)
            tl.store(out + at, tl.sum(tl.sum(gradient * gradient, 1), 0))
            gradient = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)


_KEY = ["m", "n", "length", "BLOCK_K"]
_tuned_squares = triton.autotune(CONFIGS, _KEY, restore_value=["out"])(_squares)
_tuned_square_sums = triton.autotune(CONFIGS, _KEY, reset_to_zero=["out"])(_square_sums)


def supports(total: Tensor | None, left: Tensor, right: Tensor) -> bool:
    """Whether the kernels take these: on a GPU (or interpreted), float32 or half; totals float32, rows contiguous."""
    on_device = INTERPRETED or left.is_cuda
    suited = total is None or (total.dtype == torch.float32 and total.stride(1) == 1)
    return on_device and suited and {left.dtype, right.dtype} <= {*_DTYPES}


def square_accumulate(
    total: Tensor,
    left: Tensor,
    right: Tensor,
    offsets: Sequence[int],
    *,
    precision: str = PRECISIONS[0],
    splits: int | None = None,
    config: triton.Config | None = None,
) -> None:
    r"""``total`` += :math:`\sum_b \big(\sum_{t \in b} \text{left}_t\,\text{right}_t^\top\big)^2`, in place.

    Half-precision products are exact and are summed in float32. For float32 inputs `precision` says how a product is
    formed, and with it the relative error of the squares: ``"tf32x3"`` and ``"bf16x6"`` (tensor cores, several passes)
    and ``"ieee"`` (no tensor cores) err as float32 itself does, 4e-7; ``"tf32"`` (tensor cores, one pass) 3e-4.

    Args:
        total: [m, n] float32, each row contiguous.
        left: [R, m] float32, float16 or bfloat16.
        right: [R, n], likewise.
        offsets: B+1 row numbers; sample b owns rows ``offsets[b]`` to ``offsets[b+1]``.
        precision: one of `PRECISIONS`.
        splits: programs that share a tile's samples; None for as many as fill the device. Up to rounding, nothing
            depends on it.
        config: tile sizes; None to have them tuned, once for each kind of shape and process. Last bits may differ
            between tile sizes.
    """
    if offsets[0] == offsets[-1]:
        return
    (m, n), device = total.shape, total.device
    splits = splits or num_splits(m, n, len(offsets) - 1, device)
    walk = walk_of(tuple(offsets), block_rows(offsets, left.dtype), splits, device)
    out = total[None] if splits == 1 else total.new_empty(splits, m, n)
    strides = (out.stride(1), out.stride(0))
    _run((_squares, _tuned_squares), out, left, right, walk, strides, precision, config, ADD=splits == 1)
    if splits > 1:
        total += out.sum(0)


def square_sums(
    left: Tensor,
    right: Tensor,
    offsets: Sequence[int],
    *,
    precision: str = PRECISIONS[0],
    splits: int | None = None,
    config: triton.Config | None = None,
) -> Tensor:
    r"""[B] float64, :math:`\sum_{ij} \big(\sum_{t \in b} \text{left}_{ti}\,\text{right}_{tj}\big)^2` for each sample b.

    No matrix is stored: a tile's sum is float32, that over the tiles float64. Arguments as for `square_accumulate`.
    """
    m, n, num_samples = left.shape[1], right.shape[1], len(offsets) - 1
    candidates = [config or _SMALL] if config or INTERPRETED else CONFIGS
    rows, cols = (min(c.kwargs[size] for c in candidates) for size in ("BLOCK_M", "BLOCK_N"))
    out = torch.zeros(num_samples, ceil_div(m, rows) * ceil_div(n, cols), device=left.device)
    if offsets[0] < offsets[-1]:
        splits = splits or num_splits(m, n, num_samples, left.device)
        walk = walk_of(tuple(offsets), block_rows(offsets, left.dtype), splits, left.device)
        _run((_square_sums, _tuned_square_sums), out, left, right, walk, (out.stride(0),), precision, config)
    return out.sum(1, dtype=torch.float64)


def _run(
    kernels: tuple[Any, Any],
    out: Tensor,
    left: Tensor,
    right: Tensor,
    walk: Walk,
    strides: tuple[int, ...],
    precision: str,
    config: triton.Config | None,
    **constants: Any,
) -> None:
    assert precision in PRECISIONS, precision
    plain, tuned = kernels
    (m, n), splits = (left.shape[1], right.shape[1]), len(walk.bounds) - 1
    left, right = _operands(left, right)
    config = config or (_SMALL if INTERPRETED else None)
    constants |= {"BLOCK_K": walk.block, "PRECISION": "ieee" if INTERPRETED or torch.version.hip else precision}
    arguments = (out, left, right, walk.chunks, walk.bounds, m, n, left.stride(0), right.stride(0), *strides)

    def grid(meta: Any) -> tuple[int, int]:
        return ceil_div(m, meta["BLOCK_M"]) * ceil_div(n, meta["BLOCK_N"]), splits

    with torch.cuda.device(left.device) if left.is_cuda else contextlib.nullcontext():
        if config:
            plain[grid](*arguments, walk.length, **constants, **config.all_kwargs())
        else:
            tuned[grid](*arguments, walk.length, **constants)


def _operands(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Of one dtype, with contiguous rows."""
    dtype = torch.promote_types(left.dtype, right.dtype)
    if INTERPRETED and dtype == torch.bfloat16:
        dtype = torch.float32  # NumPy, which interprets, has no bfloat16
    left, right = (x.to(dtype) for x in (left, right))
    return tuple(x if x.stride(1) == 1 else x.contiguous() for x in (left, right))  # pyright: ignore
