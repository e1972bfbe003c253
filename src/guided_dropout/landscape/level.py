"""How much of a line or a plane lies below a level."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.interpolate import PchipInterpolator

# Each cell is cut into so many along each axis; of a plane the area is then right to a few thousandths of a cell.
_FINER = 16
_Array = npt.NDArray[np.float64]
_Flags = npt.NDArray[np.bool_]


def area_below(losses: _Array, steps: _Array, level: float, *, smooth: bool = True) -> tuple[float, bool]:
    """The length or area in which the loss lies below `level`.

    Between the points it is interpolated along each axis: by a monotone cubic (Fritsch & Carlson, 1980), since a loss
    is flat where it is least and a straight line from there rises too soon; or linearly. How far the two are apart says
    whether the points are close enough.

    Args:
        losses: [n] or [n, n]; what is not finite counts as above, all the way to the points beside it.
        steps: [n] ascending coordinates of each axis.
        level: in the unit of the losses.
        smooth: whether by the cubic.

    Returns:
        Length or area in units of the coordinates, and whether it reaches the edge.
    """
    if not np.isfinite(level):
        return np.nan, False
    finite = np.isfinite(losses)
    values = np.where(finite, losses, np.max(losses, where=finite, initial=level))
    low = finite & (values < level)
    edge = any(bool(low.take(side, axis).any()) for axis in range(low.ndim) for side in (0, -1))
    if values.ndim == 1:
        at = _ends(steps)
        return _length(_interpolated(values, steps, at, smooth=smooth), at, level, _cells(finite)), edge
    at, widths = _middles(steps)
    for _ in range(2):  # rows, then columns
        values, finite = _interpolated(values, steps, at, smooth=smooth).T, _cells(finite).T
    return float(((values < level) & finite) @ widths @ widths), edge


def _length(values: _Array, at: _Array, level: float, finite: _Flags) -> float:
    """That lies below `level`, with straight lines from point to point."""
    low, high = np.minimum(values[:-1], values[1:]), np.maximum(values[:-1], values[1:])
    flat = np.where(high < level, 1.0, 0.0)
    share = np.where(high > low, np.clip((level - low) / np.where(high > low, high - low, 1.0), 0.0, 1.0), flat)
    return float((share * finite) @ np.diff(at))


def _ends(steps: _Array) -> _Array:
    """The points, and those that cut the cells between them into pieces."""
    return np.append((steps[:-1, None] + np.diff(steps)[:, None] * np.arange(_FINER) / _FINER).ravel(), steps[-1])


def _middles(steps: _Array) -> tuple[_Array, _Array]:
    """Of the same pieces the middles, and the widths."""
    ends = _ends(steps)
    return (ends[:-1] + ends[1:]) / 2, np.diff(ends)


def _interpolated(values: _Array, steps: _Array, at: _Array, *, smooth: bool) -> _Array:
    """Along the first axis: [n, …] → [len(at), …]."""
    if smooth and len(steps) > 2:
        return PchipInterpolator(steps, values)(at)
    right = np.clip(np.searchsorted(steps, at, side="right"), 1, len(steps) - 1)
    share = (at - steps[right - 1]) / (steps[right] - steps[right - 1])
    share = share.reshape(-1, *[1] * (values.ndim - 1))
    return values[right - 1] * (1 - share) + values[right] * share


def _cells(finite: _Flags) -> _Flags:
    """For each piece of a cell along the first axis whether both ends of the cell are finite."""
    return np.repeat(finite[:-1] & finite[1:], _FINER, axis=0)
