"""Which rows of an operation belong to which sample of a batch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

_COPIED = 1024  # rows at a time


@dataclass(frozen=True, eq=False)
class Layout:
    """Which of R rows belong to which of B samples.

    Attributes:
        offsets: B+1 numbers; sample b owns rows ``offsets[b]`` to ``offsets[b+1]`` of the list of rows.
        rows: [K] int64, the list of rows; None for all R rows in their order.
        step: rows per sample, where all have equally many and `rows` is None.
        with_zeros: the layout of more rows than are listed, where whatever is summed is zero in the others.
    """

    offsets: tuple[int, ...]
    rows: Tensor | None = None
    step: int | None = None
    with_zeros: Layout | None = None
    _owners: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def even(cls, num_rows: int, num_samples: int) -> Layout:
        """Equally many rows for each sample, sample after sample."""
        step = num_rows // num_samples
        return cls(tuple(step * b for b in range(num_samples + 1)), step=step)

    @classmethod
    def of_owners(cls, owners: Tensor, num_samples: int, rows: Tensor | None = None) -> Layout:
        """From the sample of each row: owners [K] int64, in any order, of the rows [K] (by default 0 … K−1)."""
        order = torch.argsort(owners, stable=True)
        counts = torch.bincount(owners, minlength=num_samples)
        return cls((0, *counts.cumsum(0).tolist()), order if rows is None else rows[order])

    @classmethod
    def concatenated(cls, layouts: Sequence[Layout], lengths: Sequence[int], device: torch.device) -> Layout:
        """Of operations whose rows are laid one after the other; `lengths` are their numbers of rows R."""
        owners = torch.cat([u.owners(device) for u in layouts])
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        rows = torch.cat([u.row_numbers(device) + s for u, s in zip(layouts, starts, strict=True)])
        return cls.of_owners(owners, layouts[0].num_samples, rows)

    @classmethod
    def in_turn(cls, layouts: Sequence[Layout], lengths: Sequence[int], device: torch.device) -> Layout:
        """Of samples and of other samples after them, whose rows are laid one after the other, R in `lengths`."""
        starts = itertools.accumulate(lengths, initial=0)
        rows = torch.cat([u.row_numbers(device) + s for u, s in zip(layouts, starts, strict=False)])
        counts = [b - a for u in layouts for a, b in itertools.pairwise(u.offsets)]
        return cls(tuple(itertools.accumulate(counts, initial=0)), rows)

    def part(self, samples: slice) -> Layout:
        """The layout of some samples that follow one another, and of their rows alone; not of listed rows."""
        first = self.offsets[samples.start]
        return Layout(tuple(n - first for n in self.offsets[samples.start : samples.stop + 1]))

    def finer(self, parts: int) -> Layout:
        """The layout of rows each of which has been cut into so many, one after the other."""
        if self.rows is None:
            step = None if self.step is None else self.step * parts
            return Layout(tuple(n * parts for n in self.offsets), step=step)
        rows = (self.rows[:, None] * parts + torch.arange(parts, device=self.rows.device)).flatten()
        return Layout(tuple(n * parts for n in self.offsets), rows)

    @property
    def num_samples(self) -> int:
        """B."""
        return len(self.offsets) - 1

    def row_numbers(self, device: torch.device) -> Tensor:
        """[K] int64, the list of rows, sample after sample."""
        return torch.arange(self.offsets[-1], device=device) if self.rows is None else self.rows

    def owners(self, device: torch.device) -> Tensor:
        """[K] int64, the sample that each row of the list belongs to."""
        if device not in self._owners:
            counts = torch.tensor(self.offsets, device="cpu").diff().to(device)
            samples = torch.arange(self.num_samples, device=device)
            self._owners[device] = samples.repeat_interleave(counts, output_size=self.offsets[-1])
        return self._owners[device]

    def only(self, kept: Tensor) -> Layout:
        """The layout of the rows numbered `kept` [K'] int64 among the list of rows; the others have no part."""
        owners = self.owners(kept.device)[kept]
        counts = torch.bincount(owners, minlength=self.num_samples)
        return Layout((0, *counts.cumsum(0).tolist()), self.row_numbers(kept.device)[kept])

    def without_zeros(self, kept: Tensor) -> Layout:
        """As `only`, where the others are zero in whatever is summed: to sum them too takes less than to pick these."""
        return replace(self.only(kept), with_zeros=self)

    def sum_rows(self, rows: Tensor) -> Tensor:
        """[R, ...] → [B, ...], each sample's rows added up, in float32 or better."""
        if self.with_zeros is not None:
            return self.with_zeros.sum_rows(rows)
        dtype = torch.promote_types(rows.dtype, torch.float32)
        if self.step is not None:
            return rows.view(self.num_samples, self.step, *rows.shape[1:]).sum(1, dtype=dtype)
        sums, owners = rows.new_zeros(self.num_samples, *rows.shape[1:], dtype=dtype), self.owners(rows.device)
        if self.rows is None:
            return sums.index_add_(0, owners, rows.to(dtype))
        for theirs, some in zip(owners.split(_COPIED), self.rows.split(_COPIED), strict=True):
            sums.index_add_(0, theirs, rows.index_select(0, some).to(dtype))
        return sums

    def spans(self) -> list[tuple[int, slice]]:
        """(sample, its part of the list of rows) for each sample that has rows."""
        pairs = zip(self.offsets[:-1], self.offsets[1:], strict=True)
        return [(b, slice(s, e)) for b, (s, e) in enumerate(pairs) if e > s]

    def take(self, rows: Tensor, span: slice) -> Tensor:
        """The rows [K', ...] of a part of the list."""
        return rows[span] if self.rows is None else rows.index_select(0, self.rows[span])
