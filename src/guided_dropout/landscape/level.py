"""How much of a line or a plane lies below a level."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# Each cell of a plane is cut into so many along each axis; the area is then right to a few thousandths of a cell.
_FINER = 16
_Array = npt.NDArray[np.float64]


def area_below(losses: _Array, steps: _Array, level: float) -> tuple[float, bool]:
    """The length or area in which the loss, interpolated linearly between the points, lies below `level`.

    Args:
        losses: [n] or [n, n]; what is not finite counts as above.
        steps: [n], equally spaced coordinates of each axis.
        level: in the unit of the losses.

    Returns:
        Length or area in units of the coordinates, and whether it reaches the edge.
    """
    values = np.where(np.isfinite(losses), losses, np.inf)
    width = float(steps[1] - steps[0])
    if values.ndim == 1:
        return sum(map(_share, values[:-1], values[1:], [level] * (len(values) - 1))) * width, bool(
            min(values[0], values[-1]) < level
        )
    edge = min(values[0].min(), values[-1].min(), values[:, 0].min(), values[:, -1].min()) < level
    at = (np.arange(_FINER) + 0.5) / _FINER
    rows = _between(values, at)
    fine = _between(rows.T, at)
    return float((fine < level).mean()) * (width * (len(steps) - 1)) ** 2, bool(edge)


def _share(a: float, b: float, level: float) -> float:
    """Share of the way from `a` to `b` that lies below `level`."""
    low, high = min(a, b), max(a, b)
    if high < level or low >= level:
        return float(high < level)
    return 0.0 if np.isinf(high) else (level - low) / (high - low)


def _between(values: _Array, at: _Array) -> _Array:
    """Rows interpolated at shares `at` of the way from each to the next: [n, m] → [(n - 1) len(at), m]."""
    low, high = values[:-1, None, :], values[1:, None, :]
    mixed = low * (1 - at[:, None]) + high * at[:, None]
    return mixed.reshape(-1, values.shape[1])
