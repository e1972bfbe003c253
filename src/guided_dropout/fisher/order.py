"""How alike two orders are: Kendall's tau of many at once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_Array = npt.NDArray[np.float64]
# Signs of differences that are held at a time.
_AT_ONCE = 1 << 22


def kendall_taus(reference: npt.ArrayLike, others: npt.ArrayLike) -> _Array:
    r"""Kendall's :math:`\tau_b` of `reference` with each row of `others`.

    :math:`\sum_{i<j} s_{ij} t_{ij} / \sqrt{\sum s_{ij}^2 \sum t_{ij}^2}`, where s and t are the signs of the
    differences: 1 the same order, −1 the opposite; pairs that are tied in either count for nothing in the numerator.

    Args:
        reference: [S].
        others: [..., S].

    Returns:
        [...], float64; NaN where one of the two has no two different values.
    """
    a, b = np.asarray(reference, dtype=np.float64), np.asarray(others, dtype=np.float64)
    low, high = np.triu_indices(len(a), 1)
    signs = np.sign(a[low] - a[high])
    rows = b.reshape(-1, len(a))
    out = np.full(len(rows), np.nan)
    step = max(1, _AT_ONCE // max(1, len(low)))
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        theirs = np.sign(some[:, low] - some[:, high])
        weights = np.abs(signs).sum() * np.abs(theirs).sum(axis=1)
        defined = weights > 0
        out[start : start + step][defined] = (theirs @ signs)[defined] / np.sqrt(weights[defined])
    return out.reshape(b.shape[:-1])
