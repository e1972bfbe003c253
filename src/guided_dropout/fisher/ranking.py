r"""When has a stream of samples settled which site has the higher Fisher score?

For two sites with scores :math:`\mu_a > \mu_b` as estimated, the claim is that the order is not wrong by more than the
tolerance :math:`\tau`: :math:`E[D] > 0` for :math:`D = (1 + \tau) Y_a - Y_b`, where :math:`Y` are the scores of single
samples. Samples are compared with themselves, since a hard sample raises all sites at once. The claim is made when

.. math:: \frac{2}{\sqrt v}\, e^{x^2/2}\, \Phi(x) \ge \frac1{\alpha'},
    \qquad x = \frac{\rho\, n\, (\bar D - R\,\ln(1/\alpha')/n)}{\hat\sigma \sqrt v}, \quad v = 1 + n \rho^2,

which is the one-sided normal-mixture test of Robbins (1970) as an asymptotic confidence sequence (Waudby-Smith et al.,
2024, arXiv 2103.06476): under :math:`E[D] \le 0` the chance that it *ever* holds is at most :math:`\alpha'`, so looking
after each batch costs nothing. Which sites are neighbours depends on the data, so :math:`\alpha' = \alpha / \binom S2`
(Bonferroni over all pairs).

Without a bound on the samples no test of a mean holds exactly: a sample that is large enough may always be yet to come.
Squared gradients have long tails, so :math:`R`, the largest deviation seen so far against the claim, is charged as
Bernstein's inequality charges a known one. In 2,000 simulated runs per cell (a steady site against a heavy one whose
true score is 10 to 20 % higher; up to 3,000 samples, a look at each eighth from the hundredth on; ten pairs, so that
:math:`\alpha'` is .005) the claim was wrong in this share of runs:

==========================  =========  ======
heavy site                  without R  with R
==========================  =========  ======
log-normal, cv 1.3               .007    .001
log-normal, cv 2.9               .021    .001
log-normal, cv 7.3               .129    .025
Pareto, tail index 3             .003    .000
Pareto, tail index 2.1           .012    .002
==========================  =========  ======

(cv: standard deviation over mean; the sites of a six-layer BERT have 0.4 to 0.6.) The third line is beyond it. So is a
cv of 2.9 where the heavy site's true score is higher by no more than the tolerance, at which the claim is only just
wrong: in 1,200 runs with R it was made in .020 at :math:`\alpha'` .005, in .086 at .05 (two sites alone); with a cv of
1.3 in .031 of 700 at .05.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import log_ndtr

from guided_dropout.errors import DataError
from guided_dropout.fisher.site_scores import Means, SiteScores

_Array = npt.NDArray[np.float64]

MIN_SAMPLES = 100
_TIGHTEST_AT = 500  # samples at which the bound is tightest; it holds at any number
_ROWS = 64


class RankingTest(SiteScores):
    """A sequential test of whether the order of the sites' Fisher scores is settled.

    A site's score is the mean, over the parameters that feed it, of each one's mean Fisher information. Samples are
    assumed to be drawn at random. Sites fed by the same parameters have the same score and count as one.

    Attributes:
        groups: site → names of the parameters that feed it.
        alpha: accepted chance that the order is called settled although two neighbours in it stand the wrong way round
            by more than `tolerance`.
        tolerance: relative difference up to which two scores may change places: as share of the lower one.
        samples: how many were added.

    Raises:
        DataError: no groups, one without parameters, or a number out of range.
    """

    def __init__(self, groups: Mapping[str, Sequence[str]], *, alpha: float = 0.05, tolerance: float = 0.05):
        if not 0 < alpha < 1:
            raise DataError(f"alpha {alpha}; expected a chance of error between 0 and 1, for instance 0.05")
        if not 0 <= tolerance < math.inf:
            raise DataError(f"rank tolerance {tolerance}; expected a relative difference of 0 or more, as 0.05")
        self.alpha, self.tolerance = alpha, tolerance
        super().__init__(groups)

    def _begin(self, size: int) -> None:
        self._mean = np.zeros(size)
        self._scatter = np.zeros((size, size))  # sums of products of deviations from the mean
        self._excess = np.zeros((size, size))  # [a, b]: the most by which a sample's score at a exceeded that at b

    def add(self, means: Means) -> None:
        """Add a batch.

        Args:
            means: for at least each parameter of `groups`, [B]: each sample's squared derivatives, averaged over the
                parameter's elements.

        Raises:
            DataError: a parameter is missing, the lengths differ, or a value is negative or not finite.
        """
        scores = self._scores(means)
        for start in range(0, len(scores), _ROWS):
            self._add(scores[start : start + _ROWS])

    @property
    def settled(self) -> bool:
        """Whether each two neighbours in the order of the scores stand the right way round, at the confidence asked."""
        return self.samples >= MIN_SAMPLES and bool(self._claims(self.tolerance).all())

    def report(self) -> dict[str, Any]:
        """What is known by now, as plain data.

        Returns:
            ``rule``; ``samples``; ``confidence`` (1 - alpha); ``tolerance``; ``settled``; ``order``: the sites from the
            lowest score to the highest; ``within_tolerance``: neighbours [lower, higher] whose order may be the other
            way round, but by no more than the tolerance; ``undecided``: neighbours of which not even that is known.
        """
        order = self._order()
        decided, strict = self._claims(self.tolerance), self._claims(0.0)
        if self.samples < MIN_SAMPLES:
            decided, strict = np.zeros_like(decided), np.zeros_like(strict)
        sites = list(self._alike.values())
        pairs = [[sites[low][0], sites[high][0]] for low, high in itertools.pairwise(order)]
        return {
            "rule": "ranked",
            "samples": self.samples,
            "confidence": 1 - self.alpha,
            "tolerance": self.tolerance,
            "settled": self.settled,
            "order": [site for k in order for site in sites[k]],
            "within_tolerance": [p for p, d, s in zip(pairs, decided, strict, strict=True) if d and not s],
            "undecided": [p for p, d in zip(pairs, decided, strict=True) if not d],
        }

    def state(self) -> dict[str, Any]:
        """What `load_state` needs to go on from here with the same result, as plain data for JSON."""
        return {
            **self.settings(),
            "groups": {site: list(names) for site, names in self.groups.items()},
            "samples": self.samples,
            "mean": self._mean.tolist(),
            "scatter": self._scatter.tolist(),
            "excess": self._excess.tolist(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up a state that `state` gave, of a test with the same settings.

        Raises:
            ArtefactError: the settings differ.
        """
        self._check_same(state, self.settings(), "ranking")
        self.samples = state["samples"]
        self._mean, self._scatter, self._excess = (np.asarray(state[k]) for k in ("mean", "scatter", "excess"))

    def settings(self) -> dict[str, Any]:
        """What makes two tests of the same sites the same, as plain data."""
        return {"rule": "ranked", "alpha": self.alpha, "tolerance": self.tolerance}

    def _add(self, scores: _Array) -> None:
        n, new = self.samples, len(scores)
        mean = scores.mean(axis=0)
        shift, centred = mean - self._mean, scores - mean
        self._scatter += centred.T @ centred + np.outer(shift, shift) * (n * new / (n + new))
        self._mean = self._mean + shift * (new / (n + new))
        self._excess = np.maximum(self._excess, (scores[:, :, None] - scores[:, None, :]).max(axis=0))
        self.samples = n + new

    def _order(self) -> npt.NDArray[np.intp]:
        return np.argsort(self._mean, kind="stable")

    def _claims(self, tolerance: float) -> npt.NDArray[np.bool_]:
        """[S - 1]: for neighbours from the lowest up, whether the order is not wrong by more than `tolerance`."""
        n, order = self.samples, self._order()
        low, high = order[:-1], order[1:]
        if n == 0 or len(low) == 0:
            return np.zeros(len(low), dtype=bool)
        c = 1 + tolerance
        mean = c * self._mean[high] - self._mean[low]
        products = c * c * self._scatter[high, high] + self._scatter[low, low] - 2 * c * self._scatter[high, low]
        deviation = np.sqrt(np.maximum(products, 0) / n)
        size = len(order)
        log_odds = math.log(size * (size - 1) / 2 / self.alpha)
        largest = self._excess[low, high] + mean  # of mean - D, at most: a tolerance only makes it smaller
        mean = mean - largest * log_odds / n
        rho2 = (2 * log_odds + math.log(2 * log_odds + 1)) / _TIGHTEST_AT
        v = 1 + n * rho2
        with np.errstate(divide="ignore", invalid="ignore"):
            x = np.clip(math.sqrt(rho2 / v) * n * mean / deviation, -1e8, 1e8)  # infinite where all samples agree
        log_wealth = math.log(2 / math.sqrt(v)) + np.square(x) / 2 + log_ndtr(x)
        return (mean > 0) & (log_wealth >= log_odds)
