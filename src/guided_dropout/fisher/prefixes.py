"""Digests of how a stream of samples begins, by which two measurements are told to have samples in common.

Fewer samples of a text are the first ones of more, so two streams that overlap mostly begin alike. A digest of all
samples would not show that; one after each power of two does, whatever their numbers are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from guided_dropout.fisher.checkpoint import Digest
from guided_dropout.fisher.stream import Item
from guided_dropout.objectives import Sample


class Prefixes:
    """The digests of the first 1, 2, 4, … samples that pass, and of all of them."""

    def __init__(self) -> None:
        self._digest, self._count = Digest(), 0
        self._found: dict[int, str] = {}

    def passing(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """`samples`, each taken note of on its way."""
        for sample in samples:
            self._digest.add([Item(self._count, sample, (0, 0))])
            self._count += 1
            if self._count & (self._count - 1) == 0:
                self._found[self._count] = str(self._digest)
            yield sample
        if self._count:
            self._found[self._count] = str(self._digest)

    def facts(self, most: int | None = None) -> dict[str, str]:
        """Number of samples → digest of so many, those of more than `most` left out; keys as JSON has them."""
        return {str(n): digest for n, digest in self._found.items() if most is None or n <= most}


def common_start(a: Mapping[str, Any], b: Mapping[str, Any]) -> int:
    """How many samples two streams begin with alike, as far as the most that both tell of; 0 where they do not."""
    most = max((int(n) for n in a.keys() & b.keys()), default=0)
    return most if most and a[str(most)] == b[str(most)] else 0
