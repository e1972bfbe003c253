"""An experiment's runs → what they show: a summary of each arm, paired comparisons, verdicts by rule. Pure.

Each model, task and fraction of the training data is a *cell*. In a cell, each guided arm is compared with its controls
(`controls.pairs`). Over the tasks of a model and fraction, the p values of a pair are corrected after Holm, and the
metrics of a seed are averaged, so that the tasks together give one comparison.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace

from guided_dropout.bench import controls
from guided_dropout.bench.arms import ArmComparison, ArmResult, Pairs, compare_arms, compare_pairs, group_by_arm
from guided_dropout.bench.folder import Run
from guided_dropout.bench.grid import Grid, RunKey
from guided_dropout.errors import DataError
from guided_dropout.results import Seeds
from guided_dropout.stats import UNDECIDED, holm

MEAN_OVER_TASKS = None


@dataclass(frozen=True)
class Cell:
    """One model on one task at one fraction of the training data.

    Attributes:
        model: label of the model.
        task: name of the task.
        fraction: of the training data.
        metric: name of the main metric; None where no run has a result.
        arms: by label.
    """

    model: str
    task: str
    fraction: float
    metric: str | None
    arms: dict[str, ArmResult]


@dataclass(frozen=True)
class Comparison:
    """A guided arm against one control.

    Attributes:
        model: label of the model.
        task: name of the task; None for the mean over the tasks.
        fraction: of the training data.
        role: what the control is for; see `controls.role`.
        same_mean: whether both arms have the same mean strength, going by their results.
        pair: the numbers.
        verdict: what they support; see `ArmComparison.verdict`.
        tasks: number of tasks in it.
        t_holm: p of the paired t test, corrected over the tasks after Holm; None for the mean over the tasks.
        t_holm_with_lost: likewise, of each task the larger p of the two without lost runs and with what stands in.
        wilcoxon_holm: likewise, of the signed-rank test.
    """

    model: str
    task: str | None
    fraction: float
    role: str
    same_mean: bool
    pair: ArmComparison
    verdict: str
    tasks: int = 1
    t_holm: float | None = None
    t_holm_with_lost: float | None = None
    wilcoxon_holm: float | None = None


@dataclass(frozen=True)
class Guidance:
    """What the controls of the same mean strength say together about guidance, in one cell or over the tasks.

    Attributes:
        model: label of the model.
        task: name of the task; None for the mean over the tasks.
        fraction: of the training data.
        guided: label of the guided arm.
        verdict: that of all these comparisons, if they agree, if one of the controls is even and one goes by no Fisher
            information at all, and if each control that was run has a result here; else undecided. A claim that must
            hold against each of the controls needs no correction for their number.
        by_verdict: verdict → controls.
        lacking: kinds of control without which nothing can be claimed: ``"even"``, ``"uneven"``.
        unpaired: controls of the guided arm that were run, without a seed that has a result in both.
        partial: those that have one on some of the tasks alone.
    """

    model: str
    task: str | None
    fraction: float
    guided: str
    verdict: str
    by_verdict: dict[str, tuple[str, ...]]
    lacking: tuple[str, ...]
    unpaired: tuple[str, ...] = ()
    partial: tuple[str, ...] = ()


@dataclass(frozen=True)
class Analysis:
    """All that a report needs.

    Attributes:
        runs: of the experiment, by key.
        models: labels, in order; likewise `tasks`, `fractions` (falling), `arms`.
        cells: (model, task, fraction) → cell, where there are runs.
        comparisons: by cell and pair.
        overall: the means over the tasks, by model, fraction and pair, where there are several tasks.
        guidance: by cell, then the means over the tasks.
        missing: runs that were asked for and are not there; None where what was asked for is not known.
        margin: largest difference that does not matter; None claims no equivalence.
        confidence: of all intervals.
    """

    runs: tuple[Run, ...]
    models: tuple[str, ...]
    tasks: tuple[str, ...]
    fractions: tuple[float, ...]
    arms: tuple[str, ...]
    cells: dict[tuple[str, str, float], Cell]
    comparisons: tuple[Comparison, ...]
    overall: tuple[Comparison, ...]
    guidance: tuple[Guidance, ...]
    missing: frozenset[RunKey] | None
    margin: float | None
    confidence: float

    @property
    def wanted(self) -> int | None:
        """How many runs there are once none is missing; None where that is not known."""
        return None if self.missing is None else len(self.runs) + len(self.missing)

    @property
    def main(self) -> str | None:
        """The guided arm that figures are about: plain ``guided``, else the first that was compared."""
        compared = dict.fromkeys(c.pair.a for c in self.comparisons)
        return next((a for a in compared if controls.name_of(a) == "guided"), next(iter(compared), None))


def analyse(
    runs: Sequence[Run], grids: Sequence[Grid] = (), *, margin: float | None = None, confidence: float = 0.95
) -> Analysis:
    """Summaries, comparisons and verdicts of an experiment, be it finished or not.

    Args:
        runs: as `Experiment.runs` gives them.
        grids: all that was asked for; orders the axes and says how many runs are missing.
        margin: largest difference that does not matter, in the metrics' unit; see `stats.verdict`.
        confidence: of the intervals, in (0, 1).

    Raises:
        DataError: no runs, runs of one cell that do not belong together, or a margin that is not above 0.
    """
    if margin is not None and not 0 < margin < math.inf:
        raise DataError(f"found a margin of {margin}; expected a difference above 0, such as 0.01 for a point")
    if not runs:
        raise DataError("found no runs; expected at least one: run `guided-dropout bench run` first")
    keys = [run.key for run in runs]
    models = _distinct([m for g in grids for m in g.models], [k.model for k in keys])
    tasks = _distinct([t for g in grids for t in g.tasks], [k.task for k in keys])
    fractions = tuple(sorted({*(f for g in grids for f in g.fractions), *(k.fraction for k in keys)}, reverse=True))
    arms = tuple(controls.in_order([*(a for g in grids for a in g.arms), *(k.arm for k in keys)]))
    missing = frozenset(k for g in grids for k in g).difference(keys) if grids else None

    held = defaultdict(list)
    for run in runs:
        held[run.key.model, run.key.task, run.key.fraction].append(run)
    places = [(m, t, f) for m in models for f in fractions for t in tasks if (m, t, f) in held]
    cells = {place: _cell(place, held[place], arms, confidence) for place in places}

    families = defaultdict(list)  # all tasks of a model, fraction and pair
    for cell in cells.values():
        for a, b in controls.pairs(list(cell.arms)):
            families[cell.model, cell.fraction, a, b].append(_compare(cell, a, b, margin, confidence))
    corrected = {key: _corrected(family) for key, family in families.items()}
    comparisons = tuple(c for family in corrected.values() for c in family)
    overall = tuple(
        _mean_over_tasks(family, margin, confidence)
        for family in corrected.values()
        if sum(c.pair.statistics is not None for c in family) > 1
    )
    return Analysis(
        tuple(runs), models, tasks, fractions, arms, cells, comparisons, overall,
        (*_guidance(comparisons), *_guidance(overall, comparisons)), missing, margin, confidence,
    )  # fmt: skip


def compare_two(analysis: Analysis, a: str, b: str) -> tuple[Comparison, ...]:
    """Any arm against any other, a − b: in each cell that has both, then over the tasks.

    An experiment has many pairs: what was not asked beforehand is a hint, however small its p.

    Args:
        analysis: of the experiment.
        a: label of an arm.
        b: label of the arm that is subtracted.

    Raises:
        DataError: the same arm twice, one of which there is no run, or two that no cell has both of.
    """
    for label in (a, b):
        if not any(label in cell.arms for cell in analysis.cells.values()):
            raise DataError(f"found no runs of {label!r}; expected one of these arms: {', '.join(analysis.arms)}")
    if a == b:
        raise DataError(f"{a!r} with itself; expected two arms of {', '.join(analysis.arms)}")
    families = defaultdict(list)
    for cell in analysis.cells.values():
        if a in cell.arms and b in cell.arms:
            compared = _compare(cell, a, b, analysis.margin, analysis.confidence)
            families[cell.model, cell.fraction].append(compared)
    if not families:
        raise DataError(f"no model, task and fraction has runs of both {a!r} and {b!r}; expected one: run them")
    found = []
    for family in families.values():
        found += _corrected(family)
        if sum(c.pair.statistics is not None for c in family) > 1:
            found.append(_mean_over_tasks(family, analysis.margin, analysis.confidence))
    return tuple(found)


def _distinct(asked: Sequence[str], found: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys([*asked, *found]))


def _cell(place: tuple[str, str, float], runs: Sequence[Run], arms: Sequence[str], confidence: float) -> Cell:
    model, task, fraction = place
    results = [run.result for run in runs if run.result is not None]
    failed = defaultdict(list)
    for run in runs:
        if run.failure is not None:
            failed[run.key.arm].append(Seeds.derive(run.key.seed))
    try:
        grouped = {arm.name: arm for arm in group_by_arm(results, failed=failed, confidence=confidence)}
    except DataError as e:
        raise DataError(f"{model}, {task}, fraction {fraction:g}: {e}") from e
    metric = results[0].metric if results else None
    return Cell(model, task, fraction, metric, {name: grouped[name] for name in arms if name in grouped})


def _compare(cell: Cell, a: str, b: str, margin: float | None, confidence: float) -> Comparison:
    arms = cell.arms[a], cell.arms[b]
    pair, role = compare_arms(*arms, confidence=confidence), controls.role(a, b)
    same_mean = controls.may_be_fair(a, b) and _same_mean(*arms)
    return Comparison(cell.model, cell.task, cell.fraction, role, same_mean, pair, pair.verdict(margin))


def _same_mean(a: ArmResult, b: ArmResult) -> bool:
    """Whether two arms regularise as much on average: by their dropout rates, and by parameters that both have."""
    if a.mean_rate is None or b.mean_rate is None:
        return False
    parameters = a.runs[0].arm_parameters, b.runs[0].arm_parameters
    alike = all(parameters[1].get(name, value) == value for name, value in parameters[0].items())
    return alike and math.isclose(a.mean_rate, b.mean_rate, rel_tol=1e-6, abs_tol=1e-9)


def _corrected(family: Sequence[Comparison]) -> list[Comparison]:
    tested = [c for c in family if c.pair.statistics is not None]
    t = holm([c.pair.statistics.t_p for c in tested if c.pair.statistics])
    with_lost = holm([_larger_p(c.pair) for c in tested])
    wilcoxon = holm([c.pair.statistics.wilcoxon_p for c in tested if c.pair.statistics])
    names = ("t_holm", "t_holm_with_lost", "wilcoxon_holm")
    by_task = {c.task: dict(zip(names, ps, strict=True)) for c, *ps in zip(tested, t, with_lost, wilcoxon, strict=True)}
    return [replace(c, **by_task.get(c.task, {})) for c in family]


def _larger_p(pair: ArmComparison) -> float | None:
    ps = [s.t_p for s in (pair.statistics, pair.with_lost) if s is not None]
    return None if None in ps else max(p for p in ps if p is not None)


def _mean_over_tasks(family: Sequence[Comparison], margin: float | None, confidence: float) -> Comparison:
    """The mean over the tasks of each seed that is there in all of them."""
    pairs = [c.pair for c in family if c.pair.statistics is not None]
    # An arm that loses all of its runs of a task has no pair there, and must not gain by it.
    chances = [c.pair.probability for c in family if c.pair.probability is not None]
    ranked = [c.pair.ranked for c in family if c.pair.ranked]
    complete = _averaged([p.pairs for p in pairs])
    ahead, behind = (_averaged([p for c in family if (p := c.pair.stood_in[i])]) for i in (0, 1))
    pair = compare_pairs(
        pairs[0].a,
        pairs[0].b,
        complete,
        (ahead, behind),
        _averaged(ranked),
        lost=(sum(c.pair.lost[0] for c in family), sum(c.pair.lost[1] for c in family)),
        seeds=frozenset().union(*(c.pair.seeds for c in family)),
        probability=sum(chances) / len(chances) if chances else None,
        confidence=confidence,
    )
    same_mean = all(c.same_mean for c in family if c.pair.statistics is not None)
    return replace(
        family[0], task=MEAN_OVER_TASKS, same_mean=same_mean, pair=pair, verdict=pair.verdict(margin), tasks=len(pairs),
        t_holm=None, t_holm_with_lost=None, wilcoxon_holm=None,
    )  # fmt: skip


def _averaged(tasks: Sequence[Pairs]) -> dict[Seeds, tuple[float, float]]:
    shared = [s for s in tasks[0] if all(s in pairs for pairs in tasks)]
    return {s: (_mean([p[s][0] for p in tasks]), _mean([p[s][1] for p in tasks])) for s in shared}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _guidance(comparisons: Sequence[Comparison], of_tasks: Sequence[Comparison] = ()) -> list[Guidance]:
    """What each cell's comparisons say together; or the means over the tasks, made from `of_tasks`."""
    families, asked = defaultdict(list), defaultdict(list)
    for c in comparisons:
        families[c.model, c.task, c.fraction, c.pair.a].append(c)
    for c in of_tasks or comparisons:
        asked[c.model, None if of_tasks else c.task, c.fraction, c.pair.a].append(c)
    # Plain dropout is a control where it has the schedule's mean, which runs that all failed do not show.
    fair = {(c.model, c.fraction, c.pair.a, c.pair.b) for c in of_tasks or comparisons if c.same_mean}
    return [_judged(m, t, f, a, family, asked[m, t, f, a], fair) for (m, t, f, a), family in families.items()]


def _judged(
    model: str,
    task: str | None,
    fraction: float,
    guided: str,
    comparisons: Sequence[Comparison],
    asked: Sequence[Comparison],
    known_fair: Set[tuple[str, float, str, str]],
) -> Guidance:
    fair = [c for c in comparisons if c.same_mean and c.pair.statistics is not None]
    by_verdict: dict[str, tuple[str, ...]] = {}
    for c in fair:
        by_verdict[c.verdict] = (*by_verdict.get(c.verdict, ()), c.pair.b)
    of_kind = controls.GUIDED[controls.name_of(guided)]
    names = [controls.name_of(c.pair.b) for c in fair]
    even = [name for name in names if name not in (*of_kind.uneven, *of_kind.partly)]
    lacking = (*(() if even else ("even",)), *(() if {*names} & {*of_kind.uneven} else ("uneven",)))
    unpaired, partial = _not_everywhere(asked, known_fair)
    agreed = len(by_verdict) == 1 and not (lacking or unpaired or partial)
    verdict = next(iter(by_verdict)) if agreed else UNDECIDED
    return Guidance(model, task, fraction, guided, verdict, by_verdict, lacking, unpaired, partial)


def _not_everywhere(
    asked: Sequence[Comparison], known_fair: Set[tuple[str, float, str, str]]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Controls without a seed that has a result in both arms, on any of the tasks; and those without on some."""
    paired: dict[str, set[str | None]] = {}
    for c in asked:
        fair = c.role == controls.CONTROL or (c.model, c.fraction, c.pair.a, c.pair.b) in known_fair
        if fair and (c.same_mean or c.pair.statistics is None):
            paired.setdefault(c.pair.b, set()).update([c.task] if c.pair.statistics else [])
    everywhere = {c.task for c in asked}
    unpaired = tuple(b for b, tasks in paired.items() if not tasks)
    return unpaired, tuple(b for b, tasks in paired.items() if tasks and tasks != everywhere)
