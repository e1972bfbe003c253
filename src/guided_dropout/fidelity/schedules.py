r"""How well a sub-sample orders the dropout sites, which is all that a schedule depends on.

A site's score is linear in the samples, so it is enough to know each sample's score at each site: the sub-sample's is
their mean. That costs next to nothing, and so the curve over the number of samples is made from many random
sub-samples.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from guided_dropout.errors import ScheduleError
from guided_dropout.fisher.order import kendall_taus
from guided_dropout.sites import DropoutSite

SUBSAMPLES = 200
"""Random sub-samples of each size on the curve, and bootstrap replicates of the whole."""
CONFIDENCE = 0.95
_SIZES = 40
_CURVE, _BOOTSTRAP = 5, 7  # keep these draws apart from others made with the same seed
_Array = npt.NDArray[np.float64]


def sample_scores(
    means: _Array, names: Sequence[str], sites: Sequence[DropoutSite], noise: Collection[str], grouping: str
) -> _Array:
    """[N, S]: each sample's score at each site, as ``schedule.site_scores`` has it by ``tensor_mean``.

    Args:
        means: [N, T] each sample's mean over each tensor.
        names: of the T tensors.
        sites: S of them.
        noise: names that no score counts.
        grouping: ``"owner"`` or ``"dataflow"``.

    Raises:
        ScheduleError: a site that nothing but noise feeds.
    """
    column = {name: i for i, name in enumerate(names)}
    scores = np.empty((len(means), len(sites)))
    for s, site in enumerate(sites):
        feeding = [column[n] for n in site.parameters_by(grouping) if n in column and n not in noise]
        if not feeding:
            raise ScheduleError(
                f"no parameter with a gradient feeds dropout site {site.path} by {grouping}; expected one or more: use "
                "the other grouping"
            )
        scores[:, s] = means[:, feeding].mean(axis=1)
    return scores


def order_metrics(full: _Array, sub: _Array) -> dict[str, Any]:
    """A sub-sample's scores [S] beside the whole text's [S].

    Returns:
        ``tau``: Kendall's tau-b, None where it is not defined; ``moved``: how many sites have another rank (equal
        scores share their mean rank); ``largest_move``: by how many places at most.
    """
    tau = float(kendall_taus(full, sub))
    moves = np.abs(rankdata(full) - rankdata(sub))
    return {
        "tau": None if np.isnan(tau) else tau,
        "moved": int((moves > 0).sum()),
        "largest_move": float(moves.max(initial=0.0)),
    }


def curve(scores: _Array, seed: int) -> dict[str, Any]:
    """Tau between the scores of n random samples and those of all, for n from 1 to N.

    Args:
        scores: [N, S].
        seed: of the sub-samples, each drawn without replacement; nested over n.

    Returns:
        ``samples``: the sizes; ``mean``, ``lower`` (what a share `CONFIDENCE` of the sub-samples reaches) and
        ``lowest`` tau of each; ``subsamples``: how many. A sub-sample that orders nothing, since its scores are all
        equal, counts as a tau of 0.
    """
    number = len(scores)
    sizes = np.unique(np.geomspace(1, number, min(_SIZES, number)).round().astype(int))
    full = scores.sum(axis=0)
    taus = np.empty((SUBSAMPLES, len(sizes)))
    for r in range(SUBSAMPLES):
        order = np.random.default_rng([seed, _CURVE, r]).permutation(number)
        taus[r] = np.nan_to_num(kendall_taus(full, scores[order].cumsum(axis=0)[sizes - 1]))
    taus[:, -1] = kendall_taus(full, full)  # all of them: not the rounding of another order
    return {
        "samples": sizes.tolist(),
        "mean": taus.mean(axis=0).tolist(),
        "lower": _lower(taus).tolist(),
        "lowest": taus.min(axis=0).tolist(),
        "subsamples": SUBSAMPLES,
    }


def bootstrap(scores: _Array, seed: int) -> dict[str, Any]:
    """Tau between the scores of all samples and those of as many drawn with replacement.

    What the whole text itself is worth: another text of its length would have given an order about as far from it.

    Returns:
        ``mean`` and ``lower`` tau; ``replicates``: how many. As in `curve`, no order counts as a tau of 0.
    """
    number = len(scores)
    full = scores.sum(axis=0)
    weights = np.stack(
        [
            np.random.default_rng([seed, _BOOTSTRAP, r]).multinomial(number, [1 / number] * number)
            for r in range(SUBSAMPLES)
        ]
    )
    taus = np.nan_to_num(kendall_taus(full, weights @ scores))
    return {"mean": float(taus.mean()), "lower": float(_lower(taus)), "replicates": SUBSAMPLES}


def recommended(found: dict[str, Any], tau: float) -> int:
    """The smallest size on the curve from which on `CONFIDENCE` of the sub-samples reach `tau`."""
    reached = np.array(found["lower"]) >= tau
    first = len(reached) - int(np.argmin(reached[::-1])) if not reached.all() else 0
    return found["samples"][min(first, len(reached) - 1)]


def _lower(taus: _Array) -> _Array:
    return np.quantile(taus, 1 - CONFIDENCE, axis=0, method="lower")
