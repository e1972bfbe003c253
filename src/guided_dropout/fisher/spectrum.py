"""How unevenly the Fisher information is spread over the parameters, without sorting them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.integrate import trapezoid

from guided_dropout.errors import ArtefactError
from guided_dropout.fisher.profile import FisherProfile

_BINS = 4096
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Spectrum:
    """The values of a Fisher diagonal from the largest down, in logarithmic bins.

    Attributes:
        values: the bins' centres (geometric), descending; bins that hold nothing are left out. Squared nats per unit
            of the parameter.
        counts: for each bin, how many parameters lie in it or above it.
        sums: for each bin, the sum of the values in it or above it.
        num_parameters: all parameters, those at exactly zero included, those of the profile's `noise` left out.
        num_zeros: parameters at exactly zero, in no bin.
    """

    values: npt.NDArray[np.float64]
    counts: npt.NDArray[np.int64]
    sums: npt.NDArray[np.float64]
    num_parameters: int
    num_zeros: int

    def top_share(self, fraction: float) -> float:
        """Share of the whole Fisher information that the largest `fraction` of the parameters holds.

        Linear between bins: exact to the width of one bin at the boundary.
        """
        return float(self.concentration(fraction))

    def concentration(self, fractions: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """`top_share` of many fractions at once."""
        fraction = np.asarray(fractions, dtype=np.float64)
        return np.asarray(
            np.interp(fraction * self.num_parameters, [0, *self.counts], [0.0, *self.sums]) / self.sums[-1]
        )

    @property
    def gini(self) -> float:
        """Gini coefficient of the values: 0 where all are equal, towards 1 where one parameter holds everything.

        Twice the area between the concentration curve and that of equal values; exact to the width of a bin.
        """
        share = np.array([0, *self.counts, self.num_parameters]) / self.num_parameters
        held = np.array([0.0, *self.sums, self.sums[-1]]) / self.sums[-1]
        return float(trapezoid(held, share) * 2 - 1)


def spectrum(profile: FisherProfile) -> Spectrum:
    """Bin the profile's diagonal: one pass for the range, one to count; memory does not grow with the model.

    Raises:
        ArtefactError: the profile holds tensor means only, or no value above zero.
    """
    tensors = [t for name, t in profile.values("the sorted values").items() if name not in profile.noise]
    size = sum(t.numel() for t in tensors)
    extremes = [(x.min(), x.max()) for x in _positive_chunks(tensors)]
    if not extremes:
        raise ArtefactError(
            f"the profile has no Fisher value above zero among {size:,}; expected some: estimate it again on text that "
            "the model's loss depends on"
        )
    low = np.log(min(a for a, _ in extremes))
    width = max((np.log(max(b for _, b in extremes)) - low) / _BINS, np.finfo(np.float64).tiny)
    counts = np.zeros(_BINS, dtype=np.int64)
    sums = np.zeros(_BINS)
    for x in _positive_chunks(tensors):
        bins = np.minimum((np.log(x) - low) / width, _BINS - 1).astype(np.int64)
        counts += np.bincount(bins, minlength=_BINS)
        sums += np.bincount(bins, weights=x, minlength=_BINS)
    held = np.flatnonzero(counts)[::-1]
    return Spectrum(
        values=np.exp(low + (held + 0.5) * width),
        counts=np.cumsum(counts[held]),
        sums=np.cumsum(sums[held]),
        num_parameters=size,
        num_zeros=size - int(counts.sum()),
    )


def _positive_chunks(tensors: Iterable[torch.Tensor]) -> Iterator[npt.NDArray[np.float64]]:
    for tensor in tensors:
        for chunk in tensor.detach().flatten().split(_CHUNK):
            x = chunk.to("cpu", torch.float64).numpy()
            positive = x[x > 0]
            if len(positive):
                yield positive
