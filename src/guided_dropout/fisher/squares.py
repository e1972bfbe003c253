r"""Per-sample gradients in a compact form, and their squares.

A batch of B samples goes through an operation as R rows; `Layout` says which rows are whose. What an operation
contributes to a parameter's per-sample gradients is a *use*:

======================  ===========================================================
``Outer(left, right)``  :math:`\sum_{t} \text{left}_t\,\text{right}_t^\top` (Linear, Conv1D)
``Rows(ids, grads)``    row ``ids[t]`` gets ``grads[t]`` (Embedding)
``Sums(grads)``         :math:`\sum_{t} \text{grads}_t` (biases, LayerNorm, RMSNorm)
======================  ===========================================================

Sums run over the rows t of one sample. `add_squares` adds up a sample's uses of a parameter, squares, and sums over the
batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# A tile of a matrix's gradient and one of its sum of squares fit a shared cache together (float32: 2 x 2 MB).
_TILE_ELEMENTS = 512 * 1024


@dataclass(frozen=True)
class Layout:
    """Which of R rows belong to which of B samples.

    Attributes:
        offsets: B+1 row numbers; sample b owns rows ``offsets[b]`` to ``offsets[b+1]``.
    """

    offsets: tuple[int, ...]

    @classmethod
    def even(cls, num_rows: int, num_samples: int) -> Layout:
        """Equally many rows for each sample, sample after sample."""
        step = num_rows // num_samples
        return cls(tuple(range(0, num_rows + 1, step)) if step else (0,) * (num_samples + 1))

    @property
    def num_samples(self) -> int:
        """B."""
        return len(self.offsets) - 1

    def owners(self, device: torch.device) -> Tensor:
        """[R] int64, the sample that each row belongs to."""
        counts = torch.tensor(self.offsets, device=device).diff()
        return torch.repeat_interleave(torch.arange(self.num_samples, device=device), counts)

    def sum_rows(self, rows: Tensor) -> Tensor:
        """[R, ...] → [B, ...], each sample's rows added up."""
        return rows.new_zeros(self.num_samples, *rows.shape[1:]).index_add_(0, self.owners(rows.device), rows)

    def spans(self) -> list[tuple[int, slice]]:
        """(sample, its rows) for each sample that has rows."""
        pairs = zip(self.offsets[:-1], self.offsets[1:], strict=True)
        return [(b, slice(s, e)) for b, (s, e) in enumerate(pairs) if e > s]


@dataclass(frozen=True)
class Outer:
    """A matrix's per-sample gradients as products of rows: left [R, m], right [R, n] → B gradients [m, n]."""

    left: Tensor
    right: Tensor
    layout: Layout

    def add_to(self, gradient: Tensor, sample: int) -> None:
        """Add sample `sample`'s gradient to `gradient` [m, n]."""
        rows = slice(self.layout.offsets[sample], self.layout.offsets[sample + 1])
        gradient.addmm_(self.left[rows].T.to(gradient.dtype), self.right[rows].to(gradient.dtype))


@dataclass(frozen=True)
class Rows:
    """A table's per-sample gradients by row: ids [R], grads [R, d] → B gradients [V, d], zero in all other rows."""

    ids: Tensor
    grads: Tensor
    layout: Layout

    def add_to(self, gradient: Tensor, sample: int) -> None:
        """Add sample `sample`'s gradient to `gradient` [V, d]."""
        rows = slice(self.layout.offsets[sample], self.layout.offsets[sample + 1])
        gradient.index_add_(0, self.ids[rows], self.grads[rows].to(gradient.dtype))


@dataclass(frozen=True)
class Sums:
    """A vector's per-sample gradients, added up over rows already: grads [B, d]."""

    grads: Tensor

    def add_to(self, gradient: Tensor, sample: int) -> None:
        """Add sample `sample`'s gradient to `gradient` [d]."""
        gradient.add_(self.grads[sample])


Use = Outer | Rows | Sums


def add_squares(total: Tensor, uses: Sequence[Use], num_samples: int) -> None:
    r"""``total`` += :math:`\sum_b (\sum_u g_{u,b})^2` over the B samples and the uses u of one parameter, in place."""
    outers = sum(isinstance(u, Outer) for u in uses)
    if all(isinstance(u, Sums) for u in uses):
        gradients = torch.stack([u.grads.to(total.dtype) for u in uses if isinstance(u, Sums)])
        total += gradients.sum(0).square_().sum(0)
    elif all(isinstance(u, Rows) for u in uses):
        _add_row_squares(total, [u for u in uses if isinstance(u, Rows)])
    elif isinstance(uses[0], Outer) and len(uses) == 1:
        _add_outer_squares(total, uses[0])
    elif outers == 1 and len(uses) == outers + sum(isinstance(u, Rows) for u in uses):
        _add_tied_squares(total, uses)
    else:
        gradient = torch.empty_like(total)
        for b in range(num_samples):
            gradient.zero_()
            for u in uses:
                u.add_to(gradient, b)
            total.addcmul_(gradient, gradient)


def _add_outer_squares(total: Tensor, use: Outer) -> None:
    """Tile by tile, so that a tile's product and its sum of squares stay in the cache for the whole batch."""
    left, right = use.left.to(total.dtype), use.right.to(total.dtype)
    step = max(1, _TILE_ELEMENTS // total.shape[1])
    spans = use.layout.spans()
    buffer = torch.empty_like(total[:step])
    for start in range(0, total.shape[0], step):
        tile = total[start : start + step]
        gradient = buffer[: len(tile)]
        for _, rows in spans:
            torch.mm(left[rows, start : start + step].T, right[rows], out=gradient)
            tile.addcmul_(gradient, gradient)


def _add_tied_squares(total: Tensor, uses: Sequence[Use]) -> None:
    r"""A table that is looked up and multiplied by: :math:`(D+E)^2 = D^2 + (2D + E)E`, and E is zero in most rows."""
    (outer,) = (u for u in uses if isinstance(u, Outer))
    _add_outer_squares(total, outer)
    samples, ids, sums = _touched_rows(total, [u for u in uses if isinstance(u, Rows)])
    left, right = outer.left.to(total.dtype), outer.right.to(total.dtype)
    for b, rows in outer.layout.spans():
        mine = samples == b
        crossed = left[rows].index_select(1, ids[mine]).T @ right[rows]
        total.index_add_(0, ids[mine], 2 * crossed * sums[mine])
    total.index_add_(0, ids, sums.square())


def _add_row_squares(total: Tensor, uses: Sequence[Rows]) -> None:
    _, ids, sums = _touched_rows(total, uses)
    total.index_add_(0, ids, sums.square_())


def _touched_rows(total: Tensor, uses: Sequence[Rows]) -> tuple[Tensor, Tensor, Tensor]:
    """(sample [K], row [K], gradient [K, d]) of the K (sample, row) pairs that the uses touch."""
    num_rows = total.shape[0]
    keys = torch.cat([u.ids + num_rows * u.layout.owners(u.ids.device) for u in uses])
    grads = torch.cat([u.grads for u in uses]).to(total.dtype)
    touched, where = torch.unique(keys, return_inverse=True)
    sums = grads.new_zeros(len(touched), grads.shape[1]).index_add_(0, where, grads)
    return touched // num_rows, touched % num_rows, sums
