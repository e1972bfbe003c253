"""The runs of one task → arms and paired comparisons: which runs belong together, and what became of the others.

A run is *lost* if it gave no metric: it *diverged* (an outcome of the arm) or *failed* (an error, whose fault is open).
A comparison is made of the seeds for which both arms have a metric. That alone would favour an arm that loses its worst
runs, so a verdict must also hold once every lost run stands in: those of the arm that is ahead as of no use (a metric
of 0, or the worst of the two arms where that is lower), those of the other at the worst of the two arms. That there is
no difference must hold whichever is taken to be ahead. Runs that *collapsed* (one class for everything) have a metric
and count like any other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from guided_dropout.data.task_data import GLUE
from guided_dropout.errors import DataError
from guided_dropout.results import RunResult, Seeds
from guided_dropout.stats import (
    HELPS,
    HURTS,
    UNDECIDED,
    ArmSummary,
    PairedComparison,
    paired_comparison,
    probability_of_improvement,
    share_better,
    summarise,
    verdict,
)

STATUSES = ("ok", "collapsed", "diverged", "failed")
Pairs = Mapping[Seeds, tuple[float, float]]
NO_USE = 0.0
"""What each metric is, or is above, for a model that has learned nothing."""


@dataclass(frozen=True)
class ArmResult:
    """One arm of an experiment on one task.

    Attributes:
        name: the arm.
        runs: its results, in the order given.
        summary: of the runs that have a metric; None if none has.
        failed: seeds of the runs that ended in an error.
    """

    name: str
    runs: tuple[RunResult, ...]
    summary: ArmSummary | None
    failed: tuple[Seeds, ...] = ()

    @property
    def values(self) -> dict[Seeds, float]:
        """The metric of each run that has one."""
        return {r.seeds: r.value for r in self.runs if r.value is not None}

    @property
    def diverged(self) -> int:
        """Runs without a metric, because a loss became infinite or NaN."""
        return sum(run.value is None for run in self.runs)

    @property
    def collapsed(self) -> int:
        """Runs with a metric that predict one class for everything."""
        return sum(run.collapsed and run.value is not None for run in self.runs)

    @property
    def made(self) -> int:
        """All runs, whatever became of them."""
        return len(self.runs) + len(self.failed)

    @property
    def lost(self) -> int:
        """Runs without a metric: diverged or failed."""
        return self.diverged + len(self.failed)

    @property
    def counts(self) -> dict[str, int]:
        """Number of runs by status; ``ok`` are those that neither collapsed nor were lost."""
        ok = len(self.runs) - self.diverged - self.collapsed
        counts = (ok, self.collapsed, self.diverged, len(self.failed))
        return dict(zip(STATUSES, counts, strict=True))

    @property
    def mean_rate(self) -> float | None:
        """Mean dropout rate of its runs."""
        return self.runs[0].rates["mean"] if self.runs else None


@dataclass(frozen=True)
class ArmComparison:
    """Arm a − arm b, seed by seed.

    Attributes:
        a: the arm in question.
        b: its control.
        statistics: of the seeds that both have a metric for; None where there are none.
        with_lost: likewise, with what stands in for lost runs where the other arm has a metric; None where nothing is
            lost.
        lost: diverged and failed runs of `a`, and of `b`.
        seeds: all that either arm has a run of.
        better: share of seeds in which a is better, ties counted half and a diverged run as worse than any metric; None
            where no seed has two runs that did not fail.
        probability: `stats.probability_of_improvement` of all runs that did not fail, diverged ones as worst.
        pairs: the metrics of both arms by seed, behind `statistics`.
        stood_in: likewise, with what stands in for lost runs: were a ahead, and were b.
        ranked: likewise, of runs that did not fail, diverged ones as worst.
    """

    a: str
    b: str
    statistics: PairedComparison | None
    with_lost: PairedComparison | None
    lost: tuple[int, int]
    seeds: frozenset[Seeds]
    better: float | None
    probability: float | None
    pairs: Pairs = field(repr=False)
    stood_in: tuple[Pairs, Pairs] = field(repr=False)
    ranked: Pairs = field(repr=False)

    @property
    def left_out(self) -> int:
        """Seeds of either arm that could not be paired."""
        return len(self.seeds) - len(self.pairs)

    def verdict(self, margin: float | None = None) -> str:
        """`stats.verdict`, which must hold both without the lost runs and with what stands in for them."""
        if self.statistics is None or not self.stood_in[0]:
            return UNDECIDED
        ruling = verdict(self.statistics, margin=margin)
        if self.with_lost is not None and verdict(self.with_lost, margin=margin) != ruling:
            return UNDECIDED
        if ruling not in (HELPS, HURTS, UNDECIDED) and not all(self._rules_alike(s, margin) for s in self.stood_in):
            return UNDECIDED
        return ruling

    def _rules_alike(self, stood_in: Pairs, margin: float | None) -> bool:
        """Whether there is no difference with these in the place of lost runs either."""
        if stood_in == self.pairs or self.statistics is None:
            return True
        compared = paired_comparison(*zip(*stood_in.values(), strict=True), confidence=self.statistics.confidence)
        return verdict(compared, margin=margin) == verdict(self.statistics, margin=margin)


def group_by_arm(
    results: Sequence[RunResult], *, failed: Mapping[str, Sequence[Seeds]] | None = None, confidence: float = 0.95
) -> list[ArmResult]:
    """The runs by arm, in the order of each arm's first run.

    Args:
        results: what the runs gave.
        failed: seeds of the runs that gave nothing, by arm.
        confidence: of the intervals.

    Raises:
        DataError: no runs, runs of different tasks, metrics or recipes, or an arm with two runs of the same seeds.
    """
    failed = failed or {}
    if not failed or results:
        check_comparable(results)
    arms = []
    for name in dict.fromkeys([*(r.arm for r in results), *failed]):
        runs = tuple(r for r in results if r.arm == name)
        values = [r.value for r in runs if r.value is not None]
        summary = summarise(values, confidence=confidence) if values else None
        arms.append(ArmResult(name, runs, summary, tuple(failed.get(name, ()))))
    return arms


def compare_arms(a: ArmResult, b: ArmResult, *, confidence: float = 0.95) -> ArmComparison:
    """Pair the runs of two arms by their seeds."""
    values, lost = (a.values, b.values), (_lost(a), _lost(b))
    seeds = dict.fromkeys([*values[0], *values[1], *lost[0], *lost[1]])
    pairs = {s: (values[0][s], values[1][s]) for s in seeds if s in values[0] and s in values[1]}
    worst = min((*values[0].values(), *values[1].values()), default=math.nan)
    no_use = min(worst, NO_USE)
    one_lost = [s for s in seeds if (s in values[0] and s in lost[1]) or (s in lost[0] and s in values[1])]
    stood_in = (
        pairs | {s: (values[0].get(s, no_use), values[1].get(s, worst)) for s in one_lost},
        pairs | {s: (values[0].get(s, worst), values[1].get(s, no_use)) for s in one_lost},
    )
    finished = [{r.seeds: -math.inf if r.value is None else r.value for r in arm.runs} for arm in (a, b)]
    ranks = [list(runs.values()) for runs in finished]
    return compare_pairs(
        a.name,
        b.name,
        pairs,
        stood_in,
        {s: (x, finished[1][s]) for s, x in finished[0].items() if s in finished[1]},
        lost=(len(lost[0]), len(lost[1])),
        seeds=frozenset(seeds),
        probability=probability_of_improvement(*ranks) if all(ranks) else None,
        confidence=confidence,
    )


def compare_pairs(
    a: str,
    b: str,
    pairs: Pairs,
    stood_in: tuple[Pairs, Pairs],
    ranked: Pairs,
    *,
    lost: tuple[int, int],
    seeds: frozenset[Seeds],
    probability: float | None,
    confidence: float,
) -> ArmComparison:
    """The comparison of metrics that are paired already; see `ArmComparison`."""

    def statistics(of: Pairs) -> PairedComparison | None:
        return paired_comparison(*zip(*of.values(), strict=True), confidence=confidence) if of else None

    found = statistics(pairs)
    ahead = stood_in[0 if found is None or found.mean > 0 else 1]
    with_lost = statistics(ahead) if ahead != pairs else None
    better = share_better(ranked.values()) if ranked else None
    return ArmComparison(a, b, found, with_lost, lost, seeds, better, probability, pairs, stood_in, ranked)


def check_comparable(results: Sequence[RunResult]) -> None:
    """Make sure that the runs differ in their arm and seeds only.

    Raises:
        DataError: they do not, or there are none.
    """
    if not results:
        raise DataError("found no runs; expected at least one result: fine-tune first")
    first = results[0]
    for r in results:
        for what, found, expected in (
            ("task", r.task, first.task),
            ("metric", r.metric, first.metric),
            ("model", _called(r.model), _called(first.model)),
            ("recipe", dict(r.recipe), dict(first.recipe)),
        ):
            if found != expected:
                raise DataError(
                    f"the runs differ in their {what}: {_difference(found, expected)}; expected runs that differ in "
                    "arm and seed only: report them apart"
                )
    seen, pairing = set(), {}
    for r in results:
        if (r.arm, r.seeds) in seen:
            raise DataError(f"found two runs of the arm {r.arm} with the same seeds; expected one: leave one out")
        seen.add((r.arm, r.seeds))
        if not r.diverged and pairing.setdefault(r.seeds, r.pairing) != r.pairing:
            raise DataError(
                f"the run of the arm {r.arm} saw other weights or batches than another of the same seeds "
                f"({_difference(dict(r.pairing), dict(pairing[r.seeds]))}); expected paired runs: run them again"
            )
        found, expected = evaluated_on(r), evaluated_on(first)
        if found != expected:
            raise DataError(
                f"the runs were evaluated on different examples, by whatever name ({r.recipe.get('eval_data')}; their "
                f"digest is {found} in one and {expected} in another); expected the same ones for all seeds: report "
                "them apart"
            )


def evaluated_on(result: RunResult) -> str | None:
    """Digest of the evaluation examples where all seeds share them; None where each seed is dealt its own."""
    return result.pairing.get("evaluation") if result.recipe.get("split", GLUE) == GLUE else None


def _called(model: Mapping[str, Any]) -> dict[str, Any]:
    """A model as it is called wherever its folder lies: an experiment may go on from another place."""
    name = str(model.get("name_or_path") or "")
    return {
        "name": name.replace("\\", "/").rstrip("/").rpartition("/")[2],
        "architecture": model.get("architecture"),
        "num_parameters": model.get("num_parameters"),
    }


def _lost(arm: ArmResult) -> dict[Seeds, None]:
    return dict.fromkeys([*(r.seeds for r in arm.runs if r.value is None), *arm.failed])


def _difference(found: object, expected: object) -> str:
    if isinstance(found, dict) and isinstance(expected, dict):
        odd = next(k for k in sorted({*found, *expected}) if found.get(k) != expected.get(k))
        return f"{odd} is {found.get(odd)!r} in one and {expected.get(odd)!r} in another"
    return f"{found!r} in one and {expected!r} in another"
