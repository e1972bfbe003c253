"""Which points of a line or a plane are evaluated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from guided_dropout.errors import DataError

# Points of a circle, so many that four of them lie on the axes.
ANGLES = 16
# In units of the filters' own norms: far beyond any loss that means something.
_LARGEST = 1e6
# Coordinates have twelve decimals: below, points would no longer be equally spaced, or fall together.
_SMALLEST = 1e-6
# The second derivative at the origin is taken with steps of this share of the radius.
STENCIL_SHARE = 1 / 50
_DIGITS = 12


@dataclass(frozen=True)
class Grid:
    """A line [-radius, radius] or a square of them, and what its numbers need beside.

    Attributes:
        dims: 1 or 2.
        points: along each axis, an odd number: the origin is one of them.
        radius: the largest step along each axis.
    """

    dims: int = 2
    points: int = 25
    radius: float = 1.0

    def __post_init__(self) -> None:
        if self.dims not in (1, 2):
            raise DataError(f"{self.dims} dimensions; expected 1 (a line) or 2 (a plane)")
        if self.points % 2 == 0 or self.points < 3:
            near = "3" if self.points < 3 else f"{self.points - 1} or {self.points + 1}"
            raise DataError(
                f"{self.points} points along an axis; expected an odd number, so that the origin is one of them: {near}"
            )
        if not _SMALLEST <= self.radius <= _LARGEST:
            raise DataError(
                f"radius {self.radius}; expected a number above 0 and at most {_LARGEST:g}, {_SMALLEST:g} at least"
            )

    @property
    def steps(self) -> npt.NDArray[np.float64]:
        """Coordinates along an axis [points], ascending, 0 exactly in the middle."""
        half = self.points // 2
        # The radius times a share, rounded as the points beside are: else both would miss the same place by a digit.
        return np.array([_point(self.radius * (k / half)) for k in range(-half, half + 1)])[:, 0]

    @cached_property
    def coordinates(self) -> npt.NDArray[np.float64]:
        r"""All points [P, dims], first the grid's, :math:`\alpha` running faster, then those beside, none twice."""
        steps = self.steps.tolist()
        grid = [(a, b) for b in steps for a in steps] if self.dims == 2 else [(a,) for a in steps]
        beside = [*self._circle(self.radii[0]), *self._circle(self.radii[1])]
        for axis in range(self.dims):
            beside += self._stencil(axis)
        return np.array(list(dict.fromkeys([*grid, *beside])))

    @property
    def radii(self) -> tuple[float, float]:
        """At which the rise of the loss is measured all around: half the radius and the radius."""
        return self.radius / 2, self.radius

    @property
    def stencil_step(self) -> float:
        """Distance between the points from which the second derivative at the origin is taken."""
        return self.radius * STENCIL_SHARE

    @property
    def origin(self) -> int:
        """Number of the origin."""
        return self.points**self.dims // 2

    def on_circle(self, radius: float) -> list[int]:
        """Numbers of the points at that distance from the origin: two of a line, `ANGLES` of a plane.

        Raises:
            DataError: not one of `radii`, nor for a line one of its steps.
        """
        index = self._index
        try:
            return [index[point] for point in self._circle(radius)]
        except KeyError:
            known = ", ".join(f"{r:g}" for r in (self.radii if self.dims == 2 else self.steps[self.points // 2 + 1 :]))
            raise DataError(f"no points at radius {radius:g}; expected one of {known}") from None

    def stencil(self, axis: int) -> list[int]:
        """Numbers of the points at -2, -1, 0, 1 and 2 steps along an axis."""
        index = self._index
        return [index[point] for point in self._stencil(axis)]

    @cached_property
    def _index(self) -> dict[tuple[float, ...], int]:
        return {tuple(point): i for i, point in enumerate(self.coordinates.tolist())}

    def _circle(self, radius: float) -> list[tuple[float, ...]]:
        if self.dims == 1:
            return [_point(-radius), _point(radius)]
        angles = [2 * math.pi * k / ANGLES for k in range(ANGLES)]
        # 15 decimals: on an axis a cosine is 0 but for rounding, which a large radius would show.
        return [_point(radius * round(math.cos(a), 15), radius * round(math.sin(a), 15)) for a in angles]

    def _stencil(self, axis: int) -> list[tuple[float, ...]]:
        return [
            _point(*(k * self.stencil_step if a == axis else 0.0 for a in range(self.dims))) for k in (-2, -1, 0, 1, 2)
        ]


def _point(*coordinates: float) -> tuple[float, ...]:
    return tuple(round(c, _DIGITS) + 0.0 for c in coordinates)  # + 0.0: -0.0 is the same place
