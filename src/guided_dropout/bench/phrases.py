"""How results are put into words and figures: every claim is written here, by rule, from an interval."""

from __future__ import annotations

from collections.abc import Sequence

from guided_dropout.bench.analysis import Comparison, Guidance
from guided_dropout.bench.arms import ArmComparison
from guided_dropout.bench.folder import Run
from guided_dropout.stats import HELPS, HURTS, UNDECIDED, Interval, verdict

NOTHING = "–"
_METRICS = {
    "matthews_correlation": "Matthews correlation",
    "pearson": "Pearson's r",
    "spearman": "Spearman's ρ",
    "f1": "F1",
}


def number(x: float | None) -> str:
    """A metric, with four decimals."""
    return NOTHING if x is None else f"{round(x, 4) + 0.0:.4f}"  # + 0.0: no -0.0000


def signed(x: float | None) -> str:
    """A difference, with its sign."""
    return NOTHING if x is None else f"{round(x, 4) + 0.0:+.4f}"


def interval(bounds: Interval | None, form: str = ".4f") -> str:
    """Two bounds between brackets."""
    return NOTHING if bounds is None else "[{}, {}]".format(*(f"{round(b, 4) + 0.0:{form}}" for b in bounds))


def p_value(p: float | None) -> str:
    """A p value, with three decimals."""
    return NOTHING if p is None else "<.001" if p < 0.0005 else f"{p:.3f}"


def share(x: float | None) -> str:
    """A share, in per cent."""
    return NOTHING if x is None else f"{x:.0%}"


def listing(names: Sequence[str]) -> str:
    """``"a, b and c"``."""
    names = list(names)
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def count(n: int, what: str) -> str:
    """``"1 run"``, ``"2,000 runs"``."""
    return f"{n:,} {what}{'s'[: n != 1]}"


def capital(text: str) -> str:
    """`text` as a sentence begins."""
    return text[:1].upper() + text[1:]


def of_the_data(fraction: float) -> str:
    """``"10 % of the training data"``."""
    return f"{100 * fraction:g} % of the training data"


def metric_name(metric: str | None) -> str:
    """A metric's name for people."""
    return NOTHING if metric is None else _METRICS.get(metric, metric.replace("_", " "))


def verdict_sentence(comparison: ArmComparison, *, margin: float | None = None) -> str:
    """What a comparison shows, in one or two sentences that claim no more than its interval does."""
    a, b, s = comparison.a, comparison.b, comparison.statistics
    if s is None:
        return f"{a} against {b}: no seed has a result in both, so nothing can be said.{_lost(comparison)}"
    ruling = comparison.verdict(margin)
    mean = f"{a} − {b} = {signed(s.mean)} on average over {count(s.n, 'seed')}"
    if s.t_interval is None:
        return f"{mean}: {ruling}. {s.notes[0]}{_lost(comparison)}"
    mean = f"{mean}, {s.confidence:.0%} interval {interval(s.t_interval, '+.4f')}"
    if ruling == HELPS:
        return f"{mean}: {a} is better than {b} here. The interval excludes zero.{_lost(comparison)}"
    if ruling == HURTS:
        return f"{mean}: {a} is worse than {b} here. The interval excludes zero.{_lost(comparison)}"
    if ruling == UNDECIDED and verdict(s, margin=margin) != UNDECIDED:
        return f"{mean}: {ruling}.{_lost(comparison)}"
    shown = f"these {count(s.n, 'seed')} do not show that {a} is better or worse than {b}"
    return f"{mean}: {ruling}. The interval includes zero: {shown}.{_lost(comparison)}"


def overview_sentence(comparisons: Sequence[Comparison], overall: Comparison | None, alpha: float) -> str:
    """A guided arm against one control: over the tasks, and task by task.

    Args:
        comparisons: of the pair, one a task.
        overall: the mean over the tasks.
        alpha: level of the tests.
    """
    first = comparisons[0]
    a, b = first.pair.a, first.pair.b
    if overall is None or overall.pair.statistics is None:
        return " ".join(f"{c.task}: {_short(c, a, b)}.{_lost(c.pair)}" for c in comparisons)
    by_verdict: dict[str, list[str]] = {}
    for c in comparisons:
        found = c.verdict if c.pair.statistics else "no seed has a result in both arms"
        by_verdict.setdefault(found, []).append(f"{c.task}{dagger(c, alpha)}")
    tasks = "; ".join(f"{v} on {listing(names)}" for v, names in by_verdict.items())
    mean = f"Mean over {overall.tasks} tasks: {_short(overall, a, b)}.{_lost(overall.pair)}"
    return f"{mean} Task by task: {tasks}."


def guidance_sentence(g: Guidance) -> str:
    """What can be said of guidance: from controls at the same mean rate, or nothing."""
    if not g.by_verdict and g.unpaired:
        controls = " or ".join(g.unpaired)
        return f"Nothing can be said of guidance itself: no seed has a result in both {g.guided} and {controls}."
    if not g.by_verdict and g.partial:
        return f"Nothing can be said of guidance itself: {_on_some_tasks(g)}."
    if not g.by_verdict:
        return "Nothing can be said of guidance itself: no control at the same mean rate has been run."
    words = {HELPS: "better than {}", HURTS: "worse than {}", UNDECIDED: "undecided against {}"}
    parts = [words.get(v, "no different from {}" + v.removeprefix("no difference")).format(listing(names))
             for v, names in g.by_verdict.items()]  # fmt: skip
    found = f"{g.guided} is {'; '.join(parts)}"
    if g.verdict == HELPS:
        return f"Guidance helps: {found}, all at the same mean rate."
    if g.verdict == HURTS:
        return f"Guidance hurts: {found}, all at the same mean rate."
    if g.verdict != UNDECIDED:
        return f"Guidance makes {g.verdict}: {found}, all at the same mean rate."
    none = "That is no verdict on guidance:"
    if g.unpaired:
        controls = " or ".join(g.unpaired)
        return f"At the same mean rate, {found}. {none} no seed has a result in both {g.guided} and {controls}."
    if g.partial:
        return f"At the same mean rate, {found}. {none} {_on_some_tasks(g)}."
    if g.lacking:
        kind = {
            "even": "the same rate at each site",
            "uneven": "uneven rates that do not go by Fisher information",
        }[g.lacking[0]]
        return f"At the same mean rate, {found}. {none} no control with {kind} has been run."
    return f"Guidance is {UNDECIDED}: {found}, all at the same mean rate."


def _on_some_tasks(g: Guidance) -> str:
    have = "has results" if len(g.partial) == 1 else "have results"
    return f"{listing(g.partial)} {have} on some of the tasks only"


def cell_text(c: Comparison, alpha: float) -> str:
    """A comparison in a table's cell: mean difference and verdict."""
    if c.pair.statistics is None:
        return NOTHING
    short = {HELPS: "helps", HURTS: "hurts", UNDECIDED: "undecided"}.get(c.verdict, "no difference")
    return f"{signed(c.pair.statistics.mean)} {short}{dagger(c, alpha)}"


def dagger(c: Comparison, alpha: float) -> str:
    """Marks a verdict that holds after Holm's correction over the tasks, with what stands in for lost runs too."""
    holds = c.verdict in (HELPS, HURTS) and c.t_holm_with_lost is not None and c.t_holm_with_lost < alpha
    return "†" if holds else ""


def failure_line(run: Run) -> str:
    """Type and first line of a failure."""
    if run.failure is None:
        return ""
    first = (run.failure.message.strip().splitlines() or [""])[0].strip()
    return f"{run.failure.error}: {first}" if first else run.failure.error


def _short(c: Comparison, a: str, b: str) -> str:
    s = c.pair.statistics
    if s is None:
        return "no seed has a result in both arms"
    bounds = f" {interval(s.t_interval, '+.4f')}" if s.t_interval else ""
    return f"{a} − {b} = {signed(s.mean)}{bounds}, {count(s.n, 'seed')}: {c.verdict}"


def _lost(comparison: ArmComparison) -> str:
    """What lost runs do to a comparison."""
    if not any(comparison.lost):
        return ""
    (na, nb), s = comparison.lost, comparison.with_lost
    text = f" {count(na, 'run')} of {comparison.a} and {nb} of {comparison.b} were lost"
    if s is None:
        return f"{text}."
    if s.t_interval is None:
        return f"{text}; with what stands in for them, the mean is {signed(s.mean)}."
    return f"{text}; with what stands in for them, the interval is {interval(s.t_interval, '+.4f')}."
