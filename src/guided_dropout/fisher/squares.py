r"""Per-sample gradients in a compact form, and their squares.

A batch of B samples goes through an operation as R rows; `Layout` says which rows are whose. What an operation
contributes to a parameter's per-sample gradients is a *use*:

======================  ===========================================================
``Outer(left, right)``  :math:`\sum_{t} \text{left}_t\,\text{right}_t^\top` (Linear, Conv1D)
``Rows(ids, grads)``    row ``ids[t]`` gets ``grads[t]`` (Embedding)
``Sums(grads)``         :math:`\sum_{t} \text{grads}_t` (biases, LayerNorm, RMSNorm)
======================  ===========================================================

Sums run over the rows t of one sample. `add_squares` adds up a sample's uses of a parameter, squares, and sums over the
batch, over the parameter's elements, or both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from guided_dropout.fisher.kernels import square_accumulate
from guided_dropout.fisher.layout import Layout


@dataclass(frozen=True)
class Outer:
    """A matrix's per-sample gradients as products of rows: left [R, m], right [R, n] → B gradients [m, n]."""

    left: Tensor
    right: Tensor
    layout: Layout


@dataclass(frozen=True)
class Rows:
    """A table's per-sample gradients by row: ids [R], grads [R, d] → B gradients [V, d], zero in all other rows."""

    ids: Tensor
    grads: Tensor
    layout: Layout


@dataclass(frozen=True)
class Sums:
    """A vector's per-sample gradients, added up over rows already: grads [B, d]."""

    grads: Tensor


@dataclass(frozen=True)
class Squared:
    """An `Outer` whose squares have been added, and of which the products with `Rows` are still to come.

    Several, with the same columns, are of groups of samples that follow one another.

    Attributes:
        columns: [C] int64, sorted: the rows that may be touched.
        left: [R, C], the columns of the outer's `left` that belong to them.
        right: [R, n], its `right`.
        layout: its layout.
    """

    columns: Tensor
    left: Tensor
    right: Tensor
    layout: Layout


Use = Outer | Rows | Sums | Squared
_MANY = 1 << 32  # more rows than any table has
_Kind = TypeVar("_Kind", Outer, Rows, Sums, Squared)


def add_squares(total: Tensor | None, uses: Sequence[Use], sums: Tensor | None = None) -> None:
    r"""Square the per-sample gradients :math:`g_b = \sum_u g_{u,b}` of one parameter, summed over its uses u.

    Args:
        total: the parameter's shape, float32 or float64; gets :math:`\sum_b g_b^2` added in place. None where only
            `sums` are wanted, which needs no memory of the parameter's size and less arithmetic.
        uses: what the operations contributed.
        sums: [B] float64; gets each :math:`\lVert g_b\rVert^2` added in place, if given.
    """
    outers, rows, vectors = _of_kind(uses, Outer), _of_kind(uses, Rows), _of_kind(uses, Sums)
    if vectors:
        if len(vectors) != len(uses):
            raise AssertionError("a vector's sums cannot be added to a matrix's products")
        _add_vector_squares(total, vectors, sums)
    elif squared := _of_kind(uses, Squared):
        if outers:
            raise AssertionError("what is squared already cannot be added to other products")
        if rows:
            _add_tied_squares(total, _joined(squared), rows, sums)
    elif outers:
        outer = _concatenated(outers)
        square_accumulate(total, sums, outer.left, outer.right, outer.layout)
        if rows:
            _add_tied_squares(total, outer, rows, sums)
    else:
        _add_touched(total, sums, *(touched := _touched_rows(rows, _dtype(total, rows[0].grads))), touched[2])


def _of_kind(uses: Sequence[Use], kind: type[_Kind]) -> list[_Kind]:
    return [u for u in uses if isinstance(u, kind)]


def _dtype(total: Tensor | None, grads: Tensor) -> torch.dtype:
    return torch.promote_types(grads.dtype, torch.float32) if total is None else total.dtype


def _add_vector_squares(total: Tensor | None, uses: Sequence[Sums], sums: Tensor | None) -> None:
    dtype = _dtype(total, uses[0].grads)
    parts = [u.grads.to(dtype) for u in uses]
    squares = (parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)).square()
    if total is not None:
        total += squares.sum(0)
    if sums is not None:
        sums += squares.reshape(len(squares), -1).sum(1, dtype=sums.dtype)


def _concatenated(uses: Sequence[Outer]) -> Outer:
    """A matrix used several times in a sample: its products are summed over the rows of all uses."""
    if len(uses) == 1:
        return uses[0]
    left, right = torch.cat([u.left for u in uses]), torch.cat([u.right for u in uses])
    return Outer(left, right, Layout.concatenated([u.layout for u in uses], [len(u.left) for u in uses], left.device))


def _joined(uses: Sequence[Squared]) -> Squared:
    """Of all samples, group after group."""
    if len(uses) == 1:
        return uses[0]
    left, right = torch.cat([u.left for u in uses]), torch.cat([u.right for u in uses])
    layout = Layout.in_turn([u.layout for u in uses], [len(u.left) for u in uses], left.device)
    return Squared(uses[0].columns, left, right, layout)


def squared_early(total: Tensor | None, outer: Outer, ids: Tensor, sums: Tensor | None = None) -> Squared:
    """Add the squares of a matrix's products now, and keep only what is needed for its products with look-ups.

    A vocabulary's worth of logits need not be kept until the embeddings' backward comes.

    Args:
        total: as for `add_squares`.
        outer: the only products of a sample with this matrix.
        ids: [K] int64, all rows that will be looked up.
        sums: as for `add_squares`.
    """
    square_accumulate(total, sums, outer.left, outer.right, outer.layout)
    columns = torch.unique(ids)
    return Squared(columns, outer.left.index_select(1, columns), outer.right, outer.layout)


def _add_tied_squares(total: Tensor | None, outer: Outer | Squared, rows: Sequence[Rows], sums: Tensor | None) -> None:
    r"""A table that is looked up and multiplied by: :math:`(D+E)^2 = D^2 + (2D + E)E`, and E is zero in most rows."""
    dtype = _dtype(total, outer.left)
    samples, ids, grads = _touched_rows(rows, dtype)
    columns = torch.searchsorted(outer.columns, ids) if isinstance(outer, Squared) else ids
    crossed = torch.zeros_like(grads)
    bounds = torch.searchsorted(samples, torch.arange(outer.layout.num_samples + 1, device=samples.device)).tolist()
    for b, span in outer.layout.spans():
        mine = slice(bounds[b], bounds[b + 1])
        left, right = outer.layout.take(outer.left, span).to(dtype), outer.layout.take(outer.right, span).to(dtype)
        torch.mm(left.index_select(1, columns[mine]).T, right, out=crossed[mine])
    _add_touched(total, sums, samples, ids, grads, crossed.mul_(2).add_(grads))
    if total is not None:  # where E is almost -D, what is left is the rounding of D², of either sign
        touched = torch.unique(ids)
        total[touched] = total[touched].clamp_(min=0)


def _add_touched(
    total: Tensor | None, sums: Tensor | None, samples: Tensor, ids: Tensor, grads: Tensor, factor: Tensor
) -> None:
    """Add ``grads * factor`` [K, d] at the rows `ids` [K], and its sum over d at `samples` [K]."""
    products = grads * factor
    if total is not None:
        total.index_add_(0, ids, products)
    if sums is not None:
        sums.index_add_(0, samples, products.sum(1, dtype=sums.dtype))


def _touched_rows(uses: Sequence[Rows], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(sample [K], row [K], gradient [K, d]) of the K (sample, row) pairs that the uses touch, by sample."""
    ids = torch.cat([_listed(u, u.ids) for u in uses])
    owners = torch.cat([u.layout.owners(ids.device) for u in uses])
    grads = torch.cat([_listed(u, u.grads) for u in uses]).to(dtype)
    touched, where = torch.unique(ids + _MANY * owners, return_inverse=True)
    summed = grads.new_zeros(len(touched), grads.shape[1]).index_add_(0, where, grads)
    return touched // _MANY, touched % _MANY, summed


def _listed(use: Rows, rows: Tensor) -> Tensor:
    """In the order of the layout's list."""
    return rows if use.layout.rows is None else rows.index_select(0, use.layout.rows)
