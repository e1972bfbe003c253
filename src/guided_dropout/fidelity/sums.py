r"""The sums of squares of all sub-samples, from one pass over the samples.

A sample belongs, in each of the D draws, to one *ring*: inside of the sub-sample of some fraction and outside of the
next smaller one. The batches are formed within cells, whose samples are in the same rings, and a cell's sum is added
once it is done to the rings that it is in, D at most. A sub-sample is the sum of its rings, the whole text that of all
rings of the first draw and of what lies outside of them; so D·K + 1 sums of the parameters' size are held, whatever the
number of samples, and one for the cell at hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from guided_dropout.fidelity.subsamples import Subsamples
from guided_dropout.fisher.accumulate import Accumulator
from guided_dropout.fisher.site_scores import Means
from guided_dropout.fisher.stream import Item, batches
from guided_dropout.fisher.totals import Totals
from guided_dropout.objectives import Objective

# A cell's sum is moved on when so many samples are in it, before the float64 sums that more would need are made.
_MOVE_AT = 512
_Array = npt.NDArray[np.float64]


class SampleMeans:
    """Takes down each sample's mean over each tensor, in the order in which they come.

    Attributes:
        rows: [N, T] float64; the first `samples` of them are filled.
        samples: how many there are.
    """

    def __init__(self, number: int, names: Sequence[str]):
        self.rows, self.samples = np.zeros((number, len(names))), 0
        self._names = list(names)

    def add(self, means: Means) -> None:
        """Take down a batch."""
        new = np.stack([np.asarray(means[name]) for name in self._names], axis=1)
        self.rows[self.samples : self.samples + len(new)] = new
        self.samples += len(new)

    def state(self) -> dict[str, Any]:
        """The number of rows alone: later ones are written over."""
        return {"samples": self.samples}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Forget the rows beyond."""
        self.samples = state["samples"]


class SubsampleSums:
    """What `fisher.run.Run` adds the batches of `ordered` to.

    Args:
        model: in evaluation mode.
        objective: the loss.
        parameters: name → parameter.
        items: all samples, those without a target left out.
        subsamples: which of them stand where, by their place in `items`.
        scores_only: no sums of the parameters' size, only the samples' means.

    Attributes:
        means: each sample's tensor means, in the order of `arrived`.
        arrived: places in `items` of the samples that were added.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        parameters: Mapping[str, nn.Parameter],
        items: Sequence[Item],
        subsamples: Subsamples,
        *,
        scores_only: bool = False,
    ):
        self.means = SampleMeans(len(items), list(parameters))
        self.inner = Accumulator(model, objective, parameters, scores_only=scores_only, observer=self.means)
        self.arrived: list[int] = []
        self._items, self._subsamples, self._scores_only = items, subsamples, scores_only
        self._levels = subsamples.levels()
        self._place = {item.index: place for place, item in enumerate(items)}
        self._rings: dict[tuple[int, int], dict[str, Tensor]] = {}
        self._waiting = 0  # samples in the cell's sum
        self._cell: tuple[int, ...] = ()

    def ordered(self, *, batch_size: int, tokens_per_batch: int | None) -> Iterator[list[Item]]:
        """The samples cell by cell, in batches of like lengths; the same each time."""
        cells = [np.arange(len(self._items))] if self._scores_only else self._subsamples.cells()
        for cell in cells:
            yield from batches(
                (self._items[place] for place in cell.tolist()),
                batch_size=batch_size,
                tokens_per_batch=tokens_per_batch,
            )

    def add(self, batch: Sequence[Item]) -> None:
        """Add a batch of one cell."""
        places = [self._place[item.index] for item in batch]
        cell = tuple(self._levels[places[0]].tolist())
        if self._waiting and (cell != self._cell or self._waiting >= _MOVE_AT):
            self._move_on()
        self.inner.add(batch)
        self._cell, self._waiting = cell, self._waiting + len(batch)
        self.arrived += places

    def check(self) -> None:
        """Make sure that the sums are finite."""
        self.inner.check()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, facts) from which `load` goes on."""
        self._move_on()
        tensors = {f"{d}/{k}/{name}": t for (d, k), ring in self._rings.items() for name, t in ring.items()}
        tensors["means"] = torch.from_numpy(self.means.rows)
        tensors["arrived"] = torch.tensor(self.arrived, dtype=torch.int64)
        if self._scores_only:
            tensors |= {f"sums/{name}": t for name, t in self.inner.totals().state().items()}
        return tensors, self.inner.state()[1]

    def load(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Take up what `state` gave."""
        self.means.rows[:] = tensors["means"].numpy()
        self.arrived = tensors["arrived"].tolist()
        sums = {n.removeprefix("sums/"): t for n, t in tensors.items() if n.startswith("sums/")}
        self.inner.load(sums or Totals(self.inner.parameters).state(), facts)
        for key, tensor in tensors.items():
            if key not in ("means", "arrived") and not key.startswith("sums/"):
                draw, level, name = key.split("/", 2)
                self._rings.setdefault((int(draw), int(level)), {})[name] = tensor

    def sample_means(self) -> _Array:
        """[N, T]: each sample's mean over each tensor, in the order of `items`."""
        rows = np.empty_like(self.means.rows)
        rows[self.arrived] = self.means.rows
        return rows

    def finish(self) -> dict[tuple[int, int], dict[str, Tensor]]:
        """The sums of each sub-sample, by (draw, place of the fraction); the whole text's go to `inner`.

        They take the rings' memory; nothing can be added after.
        """
        self._move_on()
        number, rings, zeros = len(self._subsamples.sizes), self._rings, {}
        totals, found = self.inner.totals(), {}
        for draw in range(self._subsamples.draws):
            inside = rings.pop((draw, number), None)
            for level in range(number, 0, -1):
                assert inside is not None  # the smallest sub-sample holds a sample
                found[draw, level - 1] = {name: inside[name] for name in totals}
                if level > 1:
                    ring = rings.pop((draw, level - 1), zeros)
                    inside = {n: ring[n].add_(t) if n in ring else t.clone() for n, t in inside.items()}
        outside, largest = rings.pop((0, 0), zeros), found[0, 0]
        for name in totals:
            whole = outside[name].add_(largest[name]) if name in outside else largest[name]
            totals[name].copy_(whole)
        return found

    def _move_on(self) -> None:
        """Add the cell's sum to the rings that it is in."""
        if not self._waiting:
            return
        self.inner.check()
        self._waiting = 0
        if self._scores_only:
            return
        # What lies outside of a draw is not kept, but for the first, where it makes up the whole text.
        keys = [(draw, level) for draw, level in enumerate(self._cell) if level or not draw]
        totals = self.inner.totals()
        for key in keys:
            ring = self._rings.setdefault(key, {})
            for name in totals:
                part = totals.total(name).cpu()
                ring[name] = ring[name].add_(part) if name in ring else part.clone()
        self.inner.clear()
