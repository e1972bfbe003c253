r"""How well the Fisher of a sub-sample stands for that of the whole text, on the largest values.

With :math:`F` the whole text's values and :math:`\hat F` the sub-sample's, and R the parameters with the largest
:math:`F` (a given share of all, rounding noise left out; equal values by position), ``METRICS`` are

==================  ====================================================================================================
``overlap``         Jaccard, :math:`|R \cap \hat R| / |R \cup \hat R|`; :math:`\hat R` has the largest :math:`\hat F`
``spearman``        correlation of the ranks of :math:`F` and :math:`\hat F` on R, ties at their mean rank
``pearson``         correlation of the values on R
``cosine``          :math:`\langle F, \hat F \rangle / (\|F\| \|\hat F\|)` on R
``js``              Jensen-Shannon divergence of P and Q, in nats: 0 to ln 2 (not its square root)
``kl``              :math:`KL(P \| Q) = \sum_R P \ln (P / Q)`, in nats
``kl_reverse``      :math:`KL(Q \| P)`, in nats
``mean_error``      :math:`\frac1{|R|} \sum_R |\hat F - F| / F`, the mean absolute relative error
``rms_error``       :math:`\sqrt{\frac1{|R|} \sum_R (\hat F - F)^2 / F^2}`, the root mean square of the same
==================  ====================================================================================================

P and Q are :math:`F` and :math:`\hat F` on R, each divided by its sum there. Nothing is smoothed: 0 ln 0 is 0, and
where :math:`\hat F` is zero and :math:`F` is not, ``kl`` is infinite and is given as None; ``js`` and ``kl_reverse``
are finite all the same. ``zeros`` is the share of R at which :math:`\hat F` is zero. Parameters with :math:`F = 0` (a
share so large that R reaches them) have no relative error and are left out of the last two. What is not defined (a
correlation of equal values, a sub-sample that is zero on all of R) is None.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import rel_entr
from scipy.stats import rankdata
from torch import Tensor

from guided_dropout.errors import DataError
from guided_dropout.fisher.topk import select

METRICS = ("overlap", "spearman", "pearson", "cosine", "js", "kl", "kl_reverse", "mean_error", "rms_error", "zeros")

_Array = npt.NDArray[np.float64]
_Places = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Largest:
    """The parameters with the largest values, in descending order; equal ones by position.

    Attributes:
        places: [m] positions in all of the ranked tensors, one after the other.
        values: [m] float64.
        num_ranked: how many parameters they are the largest of.
    """

    places: _Places
    values: _Array
    num_ranked: int

    def count(self, top: float) -> int:
        """How many parameters a share `top` of all is; at least 1."""
        return max(1, int(np.floor(top * self.num_ranked + 0.5)))


def largest(diagonal: Mapping[str, Tensor], top: float, exclude: Collection[str] = ()) -> Largest:
    """Find the largest share `top` of the values without sorting more than that.

    Args:
        diagonal: name → values, not negative.
        top: share of them, in (0, 1].
        exclude: names that are not ranked.

    Raises:
        DataError: a share out of range.
        ArtefactError: a value that is negative or not a number.
    """
    check_top(top)
    ranked = {name: t for name, t in diagonal.items() if name not in exclude}
    size = sum(t.numel() for t in ranked.values())
    # A share of fewer than half a parameter is one of them.
    chosen = select(ranked, min(1.0, max(top, 1 / size)))
    places, values, start = [], [], 0
    for name, tensor in ranked.items():
        if chosen.counts.get(name):
            at = chosen.mask(name).flatten().nonzero()[:, 0].cpu()
            places.append(at.numpy() + start)
            values.append(tensor.detach().flatten().cpu()[at].double().numpy())
        start += tensor.numel()
    found, held = np.concatenate(places), np.concatenate(values)
    order = np.argsort(-held, kind="stable")
    return Largest(found[order], held[order], size)


def values_at(diagonal: Mapping[str, Tensor], places: _Places, exclude: Collection[str] = ()) -> _Array:
    """The values at positions that `largest` found, in their order; float64."""
    out = np.empty(len(places))
    order = np.argsort(places)
    ascending, start = places[order], 0
    for name, tensor in diagonal.items():
        if name in exclude:
            continue
        low, high = np.searchsorted(ascending, [start, start + tensor.numel()])
        at = torch.from_numpy(ascending[low:high] - start)
        out[order[low:high]] = tensor.detach().flatten().cpu()[at].double().numpy()
        start += tensor.numel()
    return out


def compare(
    full: Largest,
    diagonal: Mapping[str, Tensor],
    scale: float,
    tops: Sequence[float],
    exclude: Collection[str] = (),
) -> dict[float, dict[str, float | None]]:
    """All metrics of one sub-sample, for each share.

    Args:
        full: the whole text's largest values, of at least the largest share.
        diagonal: the sub-sample's values or sums, for the same names.
        scale: what makes values of them.
        tops: shares of the parameters.
        exclude: names that are not ranked.

    Returns:
        Share → metric → value.
    """
    own = largest(diagonal, max(tops), exclude)
    theirs = values_at(diagonal, full.places, exclude) * scale
    found = {}
    for top in tops:
        m = full.count(top)
        shared = len(np.intersect1d(full.places[:m], own.places[:m], assume_unique=True))
        found[top] = {"overlap": shared / (2 * m - shared), **value_metrics(full.values[:m], theirs[:m])}
    return found


def value_metrics(full: npt.ArrayLike, sub: npt.ArrayLike) -> dict[str, float | None]:
    """Those of `METRICS` that compare values, ``overlap`` left out.

    Args:
        full: [m] the whole text's values on R, not negative.
        sub: [m] the sub-sample's there.
    """
    f, g = np.asarray(full, dtype=np.float64), np.asarray(sub, dtype=np.float64)
    norms = np.linalg.norm(f) * np.linalg.norm(g)
    divergences: dict[str, float | None] = dict.fromkeys(("js", "kl", "kl_reverse"))
    if f.sum() > 0 and g.sum() > 0:
        p, q = f / f.sum(), g / g.sum()
        middle = (p + q) / 2
        divergences = {
            "js": _finite((rel_entr(p, middle).sum() + rel_entr(q, middle).sum()) / 2),
            "kl": _finite(rel_entr(p, q).sum()),
            "kl_reverse": _finite(rel_entr(q, p).sum()),
        }
    errors = (g[f > 0] - f[f > 0]) / f[f > 0]
    return {
        "spearman": _correlation(rankdata(f), rankdata(g)),
        "pearson": _correlation(f, g),
        "cosine": float(f @ g / norms) if norms > 0 else None,
        **divergences,
        "mean_error": float(np.abs(errors).mean()) if len(errors) else None,
        "rms_error": float(np.sqrt(np.square(errors).mean())) if len(errors) else None,
        "zeros": float((g == 0).mean()),
    }


def check_top(top: float) -> None:
    """Refuse a share of the parameters that is none.

    Raises:
        DataError: it is not in (0, 1].
    """
    if not 0 < top <= 1:
        raise DataError(f"top share {top:g} of the parameters; expected a number above 0 and up to 1, as 0.05")


def _correlation(a: _Array, b: _Array) -> float | None:
    """Pearson's; None where one of the two is constant."""
    # Divided by its largest value first: the squares of values of 1e-200 would be zero.
    x, y = (v / v.max() if v.max() > 0 else v for v in (a, b))
    if x.min() == x.max() or y.min() == y.max():
        return None
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip(x @ y / np.sqrt((x @ x) * (y @ y)), -1, 1))


def _finite(value: float) -> float | None:
    return max(0.0, float(value)) if np.isfinite(value) else None
