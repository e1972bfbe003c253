r"""Squares of per-sample products, where nearly all of the time goes: one entry, several ways.

.. math:: \text{total}_{ij} \mathrel{+}= \sum_b \Big(\sum_{t \in b} \text{left}_{ti}\,\text{right}_{tj}\Big)^2

On a CPU a small C kernel, built on first use (`native`), keeps each sample's product in registers, in AMX's units where
there are some; on a GPU a Triton kernel does (`triton_kernel`). Half precision goes through them too, in float32 where
they do not take it. Without a compiler, and for types that these do not take, tiles that stay in the cache do. Where
only a sample's sum over i and j is wanted, the Gram identity

.. math:: \lVert L^\top R\rVert^2 = \sum_{t,t'} (L L^\top)_{tt'} (R R^\top)_{tt'}

needs no product of the parameter's size; it is taken where it is the cheaper one. Both Gram matrices are symmetric, and
the C kernel forms half of each, in registers. Its terms may cancel, as those of squares cannot: a sample of which
little is left is done by products after all, in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from guided_dropout.fisher import native
from guided_dropout.fisher.layout import Layout

try:
    from guided_dropout.fisher import triton_kernel as triton
except ImportError:  # no Triton, or one that is too old
    triton = None

# A tile of a matrix's gradient and one of its sum of squares fit a shared cache together (float32: 2 x 2 MB).
_TILE_ELEMENTS = 512 * 1024
_GRAM_ELEMENTS = 4 * 1024 * 1024
# Where a sample's terms cancel to less than this share of their sizes, too few of float32's digits are left.
_CANCELLED = 1e-3


def square_accumulate(total: Tensor | None, sums: Tensor | None, left: Tensor, right: Tensor, layout: Layout) -> None:
    """Add the squares of B per-sample products to `total`, and their sums to `sums`.

    Args:
        total: [m, n] float32 or float64, or None.
        sums: [B] float64, contiguous, or None.
        left: [R, m], any floating-point type.
        right: [R, n], of the same type.
        layout: which rows are whose.
    """
    if 0 in (left.shape[1], right.shape[1]):
        return
    half = left.device.type == "cpu" and left.dtype in (torch.bfloat16, torch.float16)
    if half and not (native.takes(total, left, right) and native.in_amx(left, right, layout)):
        left, right, layout = _widened(left, right, layout)
    if total is not None or not _by_gram(left, right, layout):
        _by_products(total, sums, left, right, layout)
    elif sums is not None:
        gram_sums(sums, left, right, layout)


def gram_sums(sums: Tensor, left: Tensor, right: Tensor, layout: Layout) -> None:
    """Add each sample's sum of squares to `sums` [B] by the Gram identity, wherever it can be; else as above."""
    left, right, layout = _widened(left, right, layout)
    found, sizes = (native.gram_sums if native.takes(None, left, right) else _grams)(left, right, layout)
    cancelled = set((found < _CANCELLED * sizes).nonzero()[:, 0].tolist())
    for b, span in layout.spans():
        if b in cancelled:
            own = layout.take(left, span).double(), layout.take(right, span).double()
            _by_products(None, found[b : b + 1].zero_(), *own, Layout.even(len(own[0]), 1))
    sums += found


def _grams(left: Tensor, right: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """As `native.gram_sums`; many samples in one product, where they have equally many rows."""
    found, sizes = left.new_zeros(2, layout.num_samples, dtype=torch.float64)
    some = max(1, _GRAM_ELEMENTS // layout.step**2) if layout.step else 1
    for b in range(0, layout.num_samples, some):
        samples = slice(b, min(b + some, layout.num_samples))
        rows = slice(layout.offsets[samples.start], layout.offsets[samples.stop])
        if rows.start == rows.stop:
            continue
        shape = (samples.stop - b, -1)
        parts = [layout.take(x, rows).unflatten(0, shape) for x in (left, right)]
        grams = [torch.bmm(x, x.mT) for x in parts]
        terms = grams[0].mul_(grams[1])
        found[samples] += terms.sum((1, 2), dtype=found.dtype)
        sizes[samples] += terms.abs_().sum((1, 2), dtype=sizes.dtype)
    return found, sizes


def _by_products(total: Tensor | None, sums: Tensor | None, left: Tensor, right: Tensor, layout: Layout) -> None:
    if native.takes(total, left, right):
        native.square_accumulate(total, sums, left, right, layout)
    elif triton is not None and triton.supports(total, left, right):
        if layout.rows is not None:
            left, right = (x.index_select(0, layout.rows) for x in (left, right))
        if total is not None:
            triton.square_accumulate(total, left, right, layout.offsets)
        if sums is not None:
            sums += triton.square_sums(left, right, layout.offsets)
    else:
        _by_tiles(total, sums, left, right, layout)


def _widened(left: Tensor, right: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Layout]:
    """In float32 at least; where that makes copies, of the rows alone that the layout lists."""
    if left.dtype == right.dtype and left.dtype in (torch.float32, torch.float64):
        return left, right, layout
    if layout.rows is not None:
        left, right = (x.index_select(0, layout.rows) for x in (left, right))
        layout = Layout(layout.offsets)
    return left.float(), right.float(), layout


def backend(device: torch.device, dtype: torch.dtype) -> str:
    """What `square_accumulate` uses for such matrices, to record: "amx", "native", "triton" or "torch"."""
    probe = torch.empty(16, 16, device=device, dtype=dtype)
    if dtype != torch.float64 and native.takes(None, probe.float(), probe.float()):
        return "amx" if native.has_amx() else "native"
    return "triton" if triton is not None and triton.supports(None, probe, probe) else "torch"


def _by_gram(left: Tensor, right: Tensor, layout: Layout) -> bool:
    """Whether the Gram matrices cost less than the products; the C kernel forms half of each."""
    m, n = left.shape[1], right.shape[1]
    gram = sum((span.stop - span.start) ** 2 for _, span in layout.spans()) * (m + n)
    if native.takes(None, left, right):
        return gram / 2 < native.products_time(left, right, layout)
    return gram < layout.offsets[-1] * m * n


def _by_tiles(total: Tensor | None, sums: Tensor | None, left: Tensor, right: Tensor, layout: Layout) -> None:
    """Tile by tile, so that a tile's product and its sum of squares stay in the cache for the whole batch."""
    left, right, layout = _widened(left, right, layout)
    m, n = left.shape[1], right.shape[1]
    if layout.rows is not None:
        left, right = (x.index_select(0, layout.rows) for x in (left, right))
    step = max(1, _TILE_ELEMENTS // n)
    product = left.new_empty(min(step, m), n)
    for start in range(0, m, step):
        height = min(step, m - start)
        tile = product[:height]
        for b, rows in layout.spans():
            torch.mm(left[rows, start : start + height].T, right[rows], out=tile)
            if total is not None:
                total[start : start + height].addcmul_(tile, tile)
            if sums is not None:
                sums[b] += torch.linalg.vector_norm(tile, dtype=torch.float64).square()
