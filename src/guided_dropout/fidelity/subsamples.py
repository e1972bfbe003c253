"""Which samples stand in which sub-sample: several draws of nested sub-samples, and the cells they cut a text into."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from guided_dropout.errors import DataError

_Indices = npt.NDArray[np.int64]
_PURPOSE = 4  # keeps these draws apart from others made with the same seed


@dataclass(frozen=True)
class Subsamples:
    """D draws of K nested sub-samples, each without replacement.

    Attributes:
        fractions: K shares of the samples, descending.
        sizes: K numbers of samples, descending: the nearest to the fraction, halves up.
        orders: for each draw a permutation of the N samples; a sub-sample is the beginning of it.
    """

    fractions: tuple[float, ...]
    sizes: tuple[int, ...]
    orders: tuple[_Indices, ...]

    @property
    def draws(self) -> int:
        """D."""
        return len(self.orders)

    def members(self, draw: int, place: int) -> _Indices:
        """Which samples stand in the sub-sample of the `place`-th fraction; ascending."""
        return np.sort(self.orders[draw][: self.sizes[place]])

    def levels(self) -> _Indices:
        """[N, D]: how many of a draw's sub-samples hold the sample: 0 none, K all, the smallest included."""
        ranks = np.stack([np.argsort(order) for order in self.orders], axis=1)
        return (ranks[..., None] < np.array(self.sizes)).sum(axis=-1)

    def cells(self) -> list[_Indices]:
        """The samples with equal levels together: what is added to the same sums. Each ascending."""
        _, cell = np.unique(self.levels(), axis=0, return_inverse=True)
        cell = cell.reshape(-1)
        return [np.flatnonzero(cell == number) for number in range(cell.max() + 1)]


def draw_subsamples(number: int, fractions: Sequence[float], draws: int, seed: int) -> Subsamples:
    """Draw sub-samples of `number` samples; a draw is a function of (seed, its number, `number`) alone.

    Raises:
        DataError: no fraction or draw, a fraction outside (0, 1) or less than half a sample, or one given twice.
    """
    if not fractions:
        raise DataError("no fraction of the samples; expected one or more between 0 and 1, as 0.1")
    for f in fractions:
        if not 0 < f < 1:
            raise DataError(f"fraction {f:g} of the samples; expected a number between 0 and 1, as 0.1")
    descending = tuple(sorted(fractions, reverse=True))
    if len(set(descending)) < len(descending):
        raise DataError(f"fractions {', '.join(f'{f:g}' for f in descending)}; expected each of them once")
    if draws < 1:
        raise DataError(f"{draws} draws; expected at least 1")
    if seed < 0:
        raise DataError(f"seed {seed}; expected 0 or more")
    sizes = tuple(math.floor(f * number + 0.5) for f in descending)
    if sizes[-1] < 1:
        raise DataError(
            f"fraction {descending[-1]:g} of {number:,} samples is no sample; expected one or more: leave the fraction "
            f"out, or give {math.ceil(0.5 / descending[-1]):,} samples or more"
        )
    orders = tuple(np.random.default_rng([seed, _PURPOSE, d]).permutation(number) for d in range(draws))
    return Subsamples(descending, sizes, orders)
