r"""When has a stream of samples settled the schedule as a whole, if a few near ties may stay open?

`ranking.RankingTest` asks for each two neighbours in the order, at a confidence that holds however often one looks: a
single near tie keeps it going. This rule asks how alike the order is to those that other samples would have given.
With the weights :math:`w_{ri} \sim \mathrm{Poisson}(1)` of sample i in replicate r (the bootstrap, as a stream), the
sites' scores in replicate r are :math:`\sum_i w_{ri} Y_i`, and the rule is met when Kendall's :math:`\tau` between the
scores of all samples and those of a replicate reaches :math:`\tau_0` in a share :math:`1 - \alpha` of the replicates.

It is looked at each time the samples have grown by a twentieth, from the hundredth on, and is no test: nothing bounds
the error of many looks, and the bootstrap is an approximation. It errs on the side of caution, since a replicate has
the sampling error twice. In 100 simulated runs per line (24 sites whose true scores rise by the factor given from one
to the next; log-normal samples with a coefficient of variation of 1.3, most of it common to all sites; up to 4,000
samples in batches of 25; :math:`\tau_0` .95, confidence .95) all runs stopped:

======  ===============  ==========================  ===============================
factor  samples, median  tau with the truth, mean    share of runs with .95 or more
======  ===============  ==========================  ===============================
1.5                 100                        1.000                          1.00
1.2                 100                         .990                          1.00
1.1                 350                         .987                          1.00
1.05              1,325                         .988                          1.00
======  ===============  ==========================  ===============================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from guided_dropout.errors import DataError
from guided_dropout.fisher.order import kendall_taus
from guided_dropout.fisher.ranking import MIN_SAMPLES
from guided_dropout.fisher.site_scores import Means, SiteScores

REPLICATES = 200
_GROWTH = 1.05


class StabilityTest(SiteScores):
    """A stopping rule: the order of the sites' Fisher scores is as alike as `tau` to what other samples would give.

    Samples are assumed to be drawn at random. A site's score and sites that count as one: see `SiteScores`.

    Attributes:
        groups: site → names of the parameters that feed it.
        tau: Kendall's tau that is asked for.
        confidence: share of the bootstrap replicates that have to reach it.
        seed: of their weights, which depend on it and on how many samples came before, not on batches.
        samples: how many were added.

    Raises:
        DataError: no groups, one without parameters, or a number out of range.
    """

    def __init__(
        self, groups: Mapping[str, Sequence[str]], *, tau: float = 0.95, confidence: float = 0.95, seed: int = 0
    ):
        for name, value in (("tau", tau), ("confidence", confidence)):
            if not 0 < value < 1:
                raise DataError(f"{name} {value} of a stable schedule; expected a number between 0 and 1, as 0.95")
        self.tau, self.confidence, self.seed = tau, confidence, seed
        super().__init__(groups)

    def _begin(self, size: int) -> None:
        self._sum = np.zeros(size)
        self._replicates = np.zeros((REPLICATES, size))
        self._next_look, self._settled = float(MIN_SAMPLES), False

    def add(self, means: Means) -> None:
        """Add a batch; see `SiteScores` for its form and errors."""
        scores = self._scores(means)
        first = self.samples
        weights = [
            np.random.default_rng([self.seed, 6, first + b]).poisson(1.0, REPLICATES) for b in range(len(scores))
        ]
        self._sum += scores.sum(axis=0)
        self._replicates += np.stack(weights, axis=1) @ scores
        self.samples += len(scores)
        if self.samples >= self._next_look:
            self._next_look = self.samples * _GROWTH
            self._settled = self._lower() >= self.tau

    @property
    def settled(self) -> bool:
        """Whether the last look found the order stable."""
        return self._settled

    def report(self) -> dict[str, Any]:
        """What is known by now, as plain data.

        Returns:
            ``rule``; ``samples``; ``confidence``; ``tau`` (asked for); ``settled``; ``order``: the sites from the
            lowest score to the highest; ``tau_lower``: what that share of the replicates reaches, None where there is
            no order.
        """
        lower = self._lower()
        sites = list(self._alike.values())
        return {
            "rule": "stable",
            "samples": self.samples,
            "confidence": self.confidence,
            "tau": self.tau,
            "settled": self._settled,
            "order": [site for k in np.argsort(self._sum, kind="stable") for site in sites[k]],
            "tau_lower": None if np.isnan(lower) else lower,
        }

    def settings(self) -> dict[str, Any]:
        """What makes two rules for the same sites the same, as plain data."""
        return {"rule": "stable", "tau": self.tau, "confidence": self.confidence, "seed": self.seed}

    def state(self) -> dict[str, Any]:
        """What `load_state` needs to go on from here with the same result, as plain data for JSON."""
        return {
            **self.settings(),
            "groups": {site: list(names) for site, names in self.groups.items()},
            "samples": self.samples,
            "sum": self._sum.tolist(),
            "replicates": self._replicates.tolist(),
            "next_look": self._next_look,
            "settled": self._settled,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up a state that `state` gave, of a rule with the same settings.

        Raises:
            ArtefactError: the settings differ.
        """
        self._check_same(state, self.settings(), "stability test")
        self.samples = state["samples"]
        self._sum, self._replicates = np.asarray(state["sum"]), np.asarray(state["replicates"])
        self._next_look, self._settled = state["next_look"], state["settled"]

    def _lower(self) -> float:
        """What a share `confidence` of the replicates reaches; 1 for a single site, NaN for equal scores."""
        if len(self._sum) < 2:
            return 1.0
        taus = kendall_taus(self._sum, self._replicates)
        if np.isnan(taus).any():
            return float("nan")
        return float(np.quantile(taus, 1 - self.confidence, method="lower"))
