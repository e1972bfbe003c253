"""Parts that all reports share: tables of arms and of differences, how to read them, what they were made with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from guided_dropout.arms import ARMS
from guided_dropout.bench.arms import ArmComparison, ArmResult
from guided_dropout.bench.controls import name_of
from guided_dropout.bench.document import Paragraph, Table
from guided_dropout.bench.phrases import NOTHING, count, interval, number, p_value, share, signed


@dataclass(frozen=True)
class Difference:
    """A row of `difference_table`.

    Attributes:
        where: its first cells.
        pair: the numbers.
        verdict: what they support.
        corrected: p of the t test and of the signed-rank test, corrected over the tasks.
    """

    where: Sequence[str]
    pair: ArmComparison
    verdict: str
    corrected: tuple[float | None, float | None] | None = None


def difference_table(head: Sequence[str], rows: Sequence[Difference], confidence: float) -> Table:
    """Paired differences, a row each.

    Args:
        head: of the first columns, which say where a difference is from.
        rows: all with corrected p values, or none.
        confidence: of the intervals.
    """
    corrected = bool(rows) and rows[0].corrected is not None
    header = [
        *head, "verdict", "pairs", "lost", "mean", f"{confidence:.0%} interval (t)", "bootstrap (BCa)", "median",
        "better in", "P(X > Y)", "t test p", *(["Holm"] if corrected else []), "signed-rank p",
        *(["Holm"] if corrected else []), "detectable",
    ]  # fmt: skip
    body = [[*row.where, row.verdict, *_figures(row, corrected)] for row in rows]
    return Table(header, body, text_columns=range(len(head) + 1))


def how_to_read(*, corrected: bool = False) -> Paragraph:
    """What the columns of `difference_table` mean, as far as their names do not say it."""
    several = (
        " Holm: the p value before it, corrected for the tasks that this pair of arms was compared on."
        if corrected
        else ""
    )
    return Paragraph(
        "The verdict follows the t interval; the bootstrap's is too narrow with so few seeds and is given for "
        "comparison. Pairs are seeds for which both arms have a metric. Lost: runs of the first and of the second arm "
        "that diverged or failed; a verdict must also hold with something in their stead, for the arm that is ahead a "
        "metric of 0, for the other the worst of the two arms, so that none gains by losing its bad runs. Better in: "
        "share of the seeds in which the first arm is better, ties counted half, a diverged run as worse than any "
        "metric. P(X > Y): the same over all pairs of runs, whatever their seeds (Agarwal et al. 2021)."
        f"{several} Detectable is the true mean difference that this many seeds, with this spread, would find in 80 % "
        "of experiments."
    )


def meaning(label: str) -> str:
    """What an arm does, in a line."""
    arm = ARMS.get(name_of(label))
    return arm.summary if arm else ""


def lost_notes(arm: ArmResult) -> list[Paragraph]:
    """What must be said of an arm's runs that diverged, failed or collapsed."""
    notes = []
    if arm.diverged:
        notes.append(Paragraph(f"{arm.diverged} of {arm.made} {arm.name} runs diverged and have no metric."))
    if arm.failed:
        notes.append(Paragraph(f"{len(arm.failed)} of {arm.made} {arm.name} runs failed and have no metric."))
    if arm.collapsed:
        notes.append(Paragraph(f"{arm.collapsed} of {arm.made} {arm.name} runs predict a single class."))
    return notes


def arm_figures(arm: ArmResult) -> list[str]:
    """Mean, interval, median and quartiles."""
    s = arm.summary
    if s is None:
        return [NOTHING] * 4
    return [number(s.mean), interval(s.interval), number(s.median), interval(s.quartiles)]


def origins(provenances: Sequence[Mapping[str, Any]]) -> list[str]:
    """What runs were made with, where and when; a line for each that differs from the others."""
    made: dict[str, list[str]] = {}
    for p in provenances:
        versions = ", ".join(f"{name} {version}{_code(name, p)}" for name, version in p.get("versions", {}).items())
        machine = [str(p[key]) for key in ("platform", "device") if p.get(key)]
        machine += [count(p["threads"], "thread")] if p.get("threads") else []
        text = f"Made with {versions}; Python {p.get('python')}. {', '.join(machine)}."
        made.setdefault(text, []).append(str(p.get("date", "")))
    return [f"{text} {_dates(dates)}".strip() for text, dates in made.items()]


def _code(package: str, provenance: Mapping[str, Any]) -> str:
    """Of this package, whose versions each hold many states of the code; earlier results do not say which."""
    return f" (code {provenance['code']})" if package == "guided-dropout" and "code" in provenance else ""


def _dates(dates: Sequence[str]) -> str:
    known = sorted(d for d in dates if d)
    if not known:
        return ""
    return f"{known[0]}." if len(known) == 1 or known[0] == known[-1] else f"{known[0]} to {known[-1]}."


def _figures(row: Difference, corrected: bool) -> list[str]:
    pair, s = row.pair, row.pair.statistics
    lost = " + ".join(map(str, pair.lost)) if any(pair.lost) else "0"
    chance = NOTHING if pair.probability is None else f"{pair.probability:.2f}"
    if s is None:
        return ["0", lost, *[NOTHING] * 4, share(pair.better), chance, *[NOTHING] * (3 + 2 * corrected)]
    holm = [[p_value(p)] if corrected else [] for p in row.corrected or (None, None)]
    return [
        str(s.n),
        lost,
        signed(s.mean),
        interval(s.t_interval, "+.4f"),
        interval(s.bca_interval, "+.4f"),
        signed(s.median),
        share(pair.better),
        chance,
        p_value(s.t_p),
        *holm[0],
        p_value(s.wilcoxon_p),
        *holm[1],
        number(s.detectable),
    ]


def facts_line(facts: Mapping[str, Any]) -> str:
    """Facts as one line: ``"epochs 3, batch size 16"``."""
    known = {key.replace("_", " "): value for key, value in facts.items() if value is not None}
    return ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in known.items()
    )
