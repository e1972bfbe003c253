"""The paper's Table 2 for an experiment: maximum and mean over the restarts, arms down, tasks across; and as LaTeX."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from guided_dropout.bench.analysis import Analysis, Cell
from guided_dropout.bench.arms import ArmResult
from guided_dropout.bench.document import Table
from guided_dropout.bench.phrases import NOTHING, metric_name, number, of_the_data
from guided_dropout.bench.published import PublishedRow, published

_MISMATCHED = "accuracy_mismatched"  # MNLI on texts of other kinds than it was trained on


@dataclass(frozen=True)
class Restarts:
    """Maxima and means of one model at one fraction of the training data.

    Attributes:
        model: label of the model.
        fraction: of the training data.
        header: of the table: arm, runs, tasks with their metrics.
        rows: one an arm.
        published: the paper's, at the same fraction; the model's name is part of the label.
        notes: which runs are in no figure, and what must be known of the published rows.
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
    columns = [column for cell in cells for column in _columns(cell)]
    tasks = [name for name, _, _ in columns]
    header = ("arm", "runs", *(f"{name} ({metric})" for name, metric, _ in columns))
    rows = []
    for arm in analysis.arms:
        made = sorted({held.made if (held := cell.arms.get(arm)) else 0 for cell in cells})
        if made != [0]:
            runs = f"{made[0]} to {made[-1]}" if len(made) > 1 else str(made[0])
            rows.append((arm, runs, *(_pair(values.get(arm, ())) for _, _, values in columns)))
    paper = published()
    beside = paper.beside(analysis.arms, tasks, fraction)
    lost = [
        f"Of {held.made} runs of {arm} on {cell.task}, {held.lost} have no metric (diverged or failed)."
        for arm in analysis.arms
        for cell in cells
        if (held := cell.arms.get(arm)) and held.lost
    ]
    return Restarts(
        model, fraction, header, tuple(rows),
        tuple((_label(row), "–" if row.note else str(paper.restarts), *(_pair(row.values.get(t, ())) for t in tasks))
              for row in beside),
        (*lost, *_notes(beside, model)),
    )  # fmt: skip


def _columns(cell: Cell) -> list[tuple[str, str, dict[str, tuple[float, float]]]]:
    """Name, metric, and maximum and mean by arm: of the task, and of MNLI's other evaluation split."""
    main = {n: (s.maximum, s.mean) for n, arm in cell.arms.items() if (s := arm.summary)}
    columns = [(cell.task, metric_name(cell.metric), main)]
    other = {n: v for n, arm in cell.arms.items() if (v := _values(arm, _MISMATCHED))}
    if other:
        pairs = {n: (max(v), math.fsum(v) / len(v)) for n, v in other.items()}
        columns.append((f"{cell.task}-mm", metric_name(cell.metric), pairs))
    return columns


def _values(arm: ArmResult, metric: str) -> list[float]:
    return [value for r in arm.runs if r.value is not None and (value := r.metrics.get(metric)) is not None]


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
    "−": "$-$", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    **{c: f"\\{c}" for c in "&%$#_{}"},
}  # fmt: skip


def _escape(text: str) -> str:
    return "".join(_LATEX.get(c, c) for c in text)
