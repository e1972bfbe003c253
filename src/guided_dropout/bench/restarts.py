"""The paper's Table 2 for an experiment: maximum and mean over the restarts, arms down, tasks across; and as LaTeX."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from guided_dropout.bench.analysis import Analysis
from guided_dropout.bench.document import Table
from guided_dropout.bench.phrases import NOTHING, number, of_the_data
from guided_dropout.bench.published import PublishedRow, published


@dataclass(frozen=True)
class Restarts:
    """Maxima and means of one model at one fraction of the training data.

    Attributes:
        model: label of the model.
        fraction: of the training data.
        header: of the table: arm, runs, tasks with their metrics.
        rows: one an arm.
        published: the paper's, at the same fraction; the model's name is part of the label.
        notes: what must be known of the published rows.
    """

    model: str
    fraction: float
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    published: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]

    def table(self) -> Table:
        """As a block of a document."""
        return Table(self.header, [*self.rows, *self.published])


def restarts(analysis: Analysis) -> list[Restarts]:
    """A table for each model and fraction that has runs."""
    tables = [_restarts(analysis, m, f) for m in analysis.models for f in analysis.fractions]
    return [table for table in tables if table is not None]


def _restarts(analysis: Analysis, model: str, fraction: float) -> Restarts | None:
    cells = [analysis.cells[place] for t in analysis.tasks if (place := (model, t, fraction)) in analysis.cells]
    if not cells:
        return None
    tasks = [cell.task for cell in cells]
    header = ("arm", "runs", *(f"{c.task} ({(c.metric or NOTHING).replace('_', ' ')})" for c in cells))
    rows = []
    for arm in analysis.arms:
        held = [cell.arms.get(arm) for cell in cells]
        if any(held):
            made = sorted({0 if a is None else a.made for a in held})
            runs = f"{made[0]} to {made[-1]}" if len(made) > 1 else str(made[0])
            summaries = [a and a.summary for a in held]
            rows.append((arm, runs, *(_pair([s.maximum, s.mean] if s else ()) for s in summaries)))
    paper = published()
    beside = paper.beside(analysis.arms, tasks, fraction)
    return Restarts(
        model, fraction, header, tuple(rows),
        tuple((_label(row), "–" if row.note else str(paper.restarts), *(_pair(row.values.get(t, ())) for t in tasks))
              for row in beside),
        _notes(beside, model),
    )  # fmt: skip


def _label(row: PublishedRow) -> str:
    return f"published, {published().model}: {row.arm}"


def _notes(rows: Sequence[PublishedRow], model: str) -> tuple[str, ...]:
    if not rows:
        return ()
    paper = published()
    same = paper.is_of(model)
    whose = "the same model" if same else f"another model ({paper.model}) than {model}"
    general = f"Published figures ({paper.source}) are of {whose}, over {paper.restarts} restarts with {paper.split}."
    return (general, *dict.fromkeys(f"{_label(r)}: {r.note}." for r in rows if r.note))


def _pair(values: Sequence[float]) -> str:
    return " / ".join(map(number, values)) or NOTHING


def to_latex(tables: Sequence[Restarts], experiment: str) -> str:
    """The tables for a paper; they need the package booktabs.

    Args:
        tables: as `restarts` gives them.
        experiment: its name, for the captions.
    """
    head = "% Maximum / mean over the restarts. Needs \\usepackage{booktabs}.\n"
    return head + "\n".join(_latex(table, experiment) for table in tables)


def _latex(t: Restarts, experiment: str) -> str:
    def line(cells: Sequence[str]) -> str:
        return " & ".join(map(_escape, cells)) + r" \\"

    heads = [re.fullmatch(r"(.*) \((.*)\)", h) for h in t.header[2:]]
    names, metrics = zip(*((h[1], h[2]) for h in heads if h), strict=True)
    caption = f"Experiment {experiment}: {t.model}, {of_the_data(t.fraction)}. Maximum / mean over the runs."
    notes = " ".join([caption, *t.notes])
    label = re.sub(r"[^\w]+", "-", f"{experiment}-{t.model}-{t.fraction:g}")
    body = [line(row) for row in t.rows]
    if t.published:
        body += [r"\midrule", *map(line, t.published)]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering\small",
            rf"\caption{{{_escape(notes)}}}",
            rf"\label{{tab:{label}}}",
            rf"\begin{{tabular}}{{lr{'c' * len(names)}}}",
            r"\toprule",
            line(["arm", "runs", *names]),
            line(["", "", *metrics]),
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "±": r"$\pm$",
    "−": "$-$", **{c: f"\\{c}" for c in "&%$#_{}"},
}  # fmt: skip


def _escape(text: str) -> str:
    return "".join(_LATEX.get(c, c) for c in text)
