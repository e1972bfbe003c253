"""Many runs → arms and paired comparisons: which runs belong together, and which are left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from guided_dropout.bench.stats import ArmSummary, PairedComparison, paired_comparison, summarise
from guided_dropout.errors import DataError
from guided_dropout.results import RunResult


@dataclass(frozen=True)
class ArmResult:
    """One arm of an experiment.

    Attributes:
        name: the arm.
        runs: its runs, in the order given.
        summary: of the runs that have a metric; None if none has.
    """

    name: str
    runs: tuple[RunResult, ...]
    summary: ArmSummary | None

    @property
    def diverged(self) -> int:
        """Runs without a metric."""
        return sum(run.value is None for run in self.runs)

    @property
    def collapsed(self) -> int:
        """Runs that predict one class for everything."""
        return sum(run.collapsed for run in self.runs)


@dataclass(frozen=True)
class ArmComparison:
    """Arm a − arm b over the seeds that both have a metric for.

    Attributes:
        a: the arm in question.
        b: its control.
        statistics: None where no seed has both.
        left_out: seeds of either arm that could not be paired.
    """

    a: str
    b: str
    statistics: PairedComparison | None
    left_out: int


def group_by_arm(results: Sequence[RunResult], *, confidence: float = 0.95) -> list[ArmResult]:
    """The runs by arm, in the order of each arm's first run.

    Raises:
        DataError: no runs, runs of different tasks, metrics or recipes, or an arm with two runs of the same seeds.
    """
    check_comparable(results)
    arms = []
    for name in dict.fromkeys(r.arm for r in results):
        runs = tuple(r for r in results if r.arm == name)
        values = [r.value for r in runs if r.value is not None]
        arms.append(ArmResult(name, runs, summarise(values, confidence=confidence) if values else None))
    return arms


def compare_arms(a: ArmResult, b: ArmResult, *, confidence: float = 0.95) -> ArmComparison:
    """Pair the runs of two arms by their seeds."""
    values_a, values_b = ({r.seeds: r.value for r in arm.runs if r.value is not None} for arm in (a, b))
    shared = [s for s in values_a if s in values_b]
    everywhere = {r.seeds for arm in (a, b) for r in arm.runs}
    statistics = None
    if shared:
        pairs = [values_a[s] for s in shared], [values_b[s] for s in shared]
        statistics = paired_comparison(*pairs, confidence=confidence)
    return ArmComparison(a.name, b.name, statistics, len(everywhere) - len(shared))


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
            ("model", r.model.get("name_or_path"), first.model.get("name_or_path")),
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


def _difference(found: object, expected: object) -> str:
    if isinstance(found, dict) and isinstance(expected, dict):
        odd = next(k for k in sorted({*found, *expected}) if found.get(k) != expected.get(k))
        return f"{odd} is {found.get(odd)!r} in one and {expected.get(odd)!r} in another"
    return f"{found!r} in one and {expected!r} in another"
