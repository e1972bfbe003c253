"""The parameters with the largest or smallest Fisher values, without sorting or copying them all.

The order of non-negative floats is the order of their bit patterns read as integers, so the value at the boundary is
found 16 bits at a time: a histogram of the highest 16, then one of the next 16 among those that agree so far (a radix
selection; two passes over float32). Memory: the histogram, and a chunk of a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from guided_dropout.errors import ArtefactError, DataError

_CHUNK = 1 << 22
_DIGIT = 16
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


@dataclass(frozen=True)
class Selection:
    """Which parameters are chosen: an exact number of them, equal values by position.

    Attributes:
        count: how many are chosen.
        num_ranked: how many they were chosen from.
        largest: whether the largest were chosen, or the smallest.
        threshold: the last value that is chosen; NaN where none is.
        counts: name → how many of its elements are chosen.
        ties: name → how many of its elements that equal the threshold are chosen: its first ones.
        tensors: name → the values; those that take no part have no entry in `counts`.
    """

    count: int
    num_ranked: int
    largest: bool
    threshold: float
    counts: Mapping[str, int]
    ties: Mapping[str, int]
    tensors: Mapping[str, Tensor]

    def mask(self, name: str) -> Tensor:
        """The chosen elements of one tensor: boolean, of its shape, on its device; made anew on each call."""
        if name not in self.tensors:
            known = ", ".join(list(self.tensors)[:3])
            raise ArtefactError(f"no tensor {name!r}; expected the name of a parameter of the profile, as {known}, …")
        values = self.tensors[name].detach()
        if not self.counts.get(name):
            return torch.zeros(values.shape, dtype=torch.bool, device=values.device)
        values = values.flatten().to(_widest(self.tensors))
        chosen = values > self.threshold if self.largest else values < self.threshold
        chosen[(values == self.threshold).nonzero().squeeze(1)[: self.ties[name]]] = True
        return chosen.view(self.tensors[name].shape)

    def masks(self) -> Iterator[tuple[str, Tensor]]:
        """(name, mask) of each tensor in turn; ``dict(selection.masks())`` holds one byte a parameter."""
        return ((name, self.mask(name)) for name in self.tensors)


def select(
    tensors: Mapping[str, Tensor], fraction: float, *, largest: bool = True, exclude: Collection[str] = ()
) -> Selection:
    """Choose the largest (or smallest) `fraction` of all elements of `tensors`.

    Args:
        tensors: name → values, not negative; floating point of any precision, compared in the widest of them.
        fraction: share of the elements, in [0, 1]; the number is rounded to the nearest, halves up.
        largest: the largest ones; otherwise the smallest.
        exclude: names whose elements are neither counted nor chosen.

    Returns:
        Exactly that many; where values equal the threshold, the first ones in the order of `tensors`, row by row.

    Raises:
        DataError: a fraction outside [0, 1].
        ArtefactError: a value that is negative or not a number.
    """
    if not 0 <= fraction <= 1:
        raise DataError(f"fraction {fraction}; expected a share of the parameters in [0, 1]")
    ranked = {name: t for name, t in tensors.items() if name not in exclude}
    size = sum(t.numel() for t in ranked.values())
    count = math.floor(fraction * size + 0.5)
    for name, t in ranked.items():
        _check(name, t)
    if count == 0:
        return Selection(0, size, largest, math.nan, dict.fromkeys(ranked, 0), dict.fromkeys(ranked, 0), tensors)
    wide = _widest(tensors)
    pattern = _select_pattern(ranked, count if largest else size - count + 1, wide)
    beyond, equal = _count(ranked, pattern, wide, largest)
    left, ties = count - sum(beyond.values()), {}
    for name in ranked:
        ties[name] = min(left, equal[name])
        left -= ties[name]
    return Selection(
        count=count,
        num_ranked=size,
        largest=largest,
        threshold=torch.tensor(pattern, dtype=_BITS[wide]).view(wide).item(),
        counts={name: beyond[name] + ties[name] for name in ranked},
        ties=ties,
        tensors=tensors,
    )


def _widest(tensors: Mapping[str, Tensor]) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors.values()) else torch.float32


def _check(name: str, values: Tensor) -> None:
    if not values.numel():
        return
    low = values.min().item()  # NaN where any is
    if not low >= 0:
        raise ArtefactError(
            f"a Fisher value of {name} is {low}; expected a number that is not negative: estimate the profile again"
        )


def _patterns(values: Tensor, wide: torch.dtype) -> Iterator[Tensor]:
    """The values as integers of the same order, chunk by chunk."""
    for chunk in values.detach().flatten().split(_CHUNK):
        yield (chunk.to("cpu", wide) + 0.0).view(_BITS[wide])  # + 0.0 makes -0.0 the same zero as 0.0


def _select_pattern(tensors: Mapping[str, Tensor], rank: int, wide: torch.dtype) -> int:
    """The `rank`-th largest value (from 1), as its bit pattern."""
    pattern = 0
    for shift in range(torch.finfo(wide).bits - _DIGIT, -1, -_DIGIT):
        histogram = torch.zeros(1 << _DIGIT, dtype=torch.int64)
        for values in tensors.values():
            for bits in _patterns(values, wide):
                digits = bits >> shift
                agreeing = digits[digits >> _DIGIT == pattern]
                histogram += (agreeing & ((1 << _DIGIT) - 1)).bincount(minlength=1 << _DIGIT)
        at_least = histogram.flip(0).cumsum(0).flip(0)  # [v]: how many have the digit v or above
        digit = int((at_least >= rank).nonzero().max())
        rank -= int(at_least[digit] - histogram[digit])
        pattern = (pattern << _DIGIT) | digit
    return pattern


def _count(
    tensors: Mapping[str, Tensor], pattern: int, wide: torch.dtype, largest: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """For each tensor, how many values lie strictly beyond `pattern` and how many equal it."""
    beyond, equal = dict.fromkeys(tensors, 0), dict.fromkeys(tensors, 0)
    for name, values in tensors.items():
        for bits in _patterns(values, wide):
            beyond[name] += int((bits > pattern if largest else bits < pattern).sum())
            equal[name] += int((bits == pattern).sum())
    return beyond, equal
