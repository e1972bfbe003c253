"""The figures of an experiment's report: which arms and tasks stand together, so that many of them stay readable."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from guided_dropout.bench import controls
from guided_dropout.bench.analysis import Analysis, Cell, Comparison
from guided_dropout.bench.csv_files import OVERALL
from guided_dropout.bench.document import Block, Heading, Paragraph, Picture
from guided_dropout.bench.phrases import listing, metric_name
from guided_dropout.plots.bench import CURVES, ArmRuns, Curve, Effect, plot_curves, plot_forest, plot_runs
from guided_dropout.plots.figures import figure_svg
from guided_dropout.stats import HELPS, HURTS

_COLUMNS = 4  # fractions side by side
_ROWS = 44  # rows in a figure


def curves(analysis: Analysis) -> list[Block]:
    """The metric over the fractions, as in the paper's Figure 4; nothing where there is one fraction."""
    if len(analysis.fractions) < 2:
        return []
    blocks: list[Block] = [
        Heading("Much and little training data"),
        Paragraph(
            "Lines are means over the runs, bands the quartiles, as in Figure 4 of the paper. Bands are drawn for "
            "arms with a heavy line alone."
        ),
    ]
    for model in analysis.models:
        for number, arms in enumerate(_groups(analysis)):
            panels, metrics = {}, {}
            for task in analysis.tasks:
                cells = [c for f in analysis.fractions if (c := analysis.cells.get((model, task, f)))]
                lines = [_curve(cells, arm, len(arms) <= 3 or arm in arms[:2]) for arm in arms]
                if any(line.means for line in lines):
                    panels[task] = lines
                    metrics[task] = metric_name(next(c.metric for c in cells if c.metric))
            if panels:
                blocks.append(
                    _picture(
                        plot_curves(panels, metrics),
                        f"curves-{model}-{number + 1}",
                        f"{model}: metric over the share of the training data, a panel for each task",
                        f"{model}: {', '.join(arms)}." + _lost(analysis, model, arms),
                    )
                )
    return blocks


def forests(analysis: Analysis) -> list[Block]:
    """The main guided arm against its controls, and against other regularizers."""
    main = analysis.main
    held = [c for c in (*analysis.comparisons, *analysis.overall) if c.pair.a == main]
    if main is None or not any(c.pair.statistics for c in held):
        return []
    blocks: list[Block] = [Heading("Effects")]
    for model in analysis.models:
        for name, others in (("controls", False), ("regularizers", True)):
            about = [c for c in held if c.model == model and (c.role == controls.OTHER) == others]
            for number, columns in enumerate(_forest_parts(analysis, about, main)):
                what = "other regularizers" if others else "standard dropout, its controls and no dropout"
                blocks.append(
                    _picture(
                        plot_forest(columns, arm=main, margin=analysis.margin),
                        f"effects-{model}-{name}-{number + 1}",
                        f"{model}: differences {main} minus control with intervals, a row for each task and control",
                        f"{model}: {main} against {what}; means of the paired differences with their "
                        f"{analysis.confidence:.0%} t intervals. Arrows: an interval goes on beyond the axis."
                        + (f" Shaded: ±{analysis.margin:g}." if analysis.margin is not None else ""),
                    )
                )
    return blocks


def run_by_run(analysis: Analysis) -> list[Block]:
    """Each run, and each difference, task by task."""
    main = analysis.main
    by_place: dict[Any, list[Comparison]] = {}
    for c in analysis.comparisons:
        if c.pair.a == main:
            by_place.setdefault((c.model, c.task, c.fraction), []).append(c)
    blocks: list[Block] = [Heading("Run by run")]
    for model in analysis.models:
        for task in analysis.tasks:
            cells = [c for f in analysis.fractions if (c := analysis.cells.get((model, task, f)))]
            metric = next((c.metric for c in cells if c.metric), None)
            if metric is None:
                continue
            panels = {
                f"{100 * c.fraction:g} % of the training data": _arm_runs(c, main, by_place) for c in cells if c.metric
            }
            for number, part in enumerate(_cut(panels, [len(p) for p in panels.values()])):
                blocks.append(
                    _picture(
                        plot_runs(part, arm=main, metric=metric_name(metric)),
                        f"runs-{model}-{task}-{number + 1}",
                        f"{model}, {task}: the metric of each run by arm, and the differences seed by seed",
                        f"{task}, {model}. Left: each run; the dashed line is the mean of {main}. Right: {main} − that "
                        f"arm for each seed, with the mean and its {analysis.confidence:.0%} interval; filled where it "
                        "helps or hurts."
                        if main
                        else f"{task}, {model}: each run.",
                    )
                )
    return blocks if len(blocks) > 1 else []


def _groups(analysis: Analysis) -> list[list[str]]:
    """Arms that share a figure: the main one and standard dropout in each, as many others as stay readable."""
    main = analysis.main
    fixed = [a for a in dict.fromkeys([main, "dropout"]) if a in analysis.arms]
    others = [a for a in analysis.arms if a not in fixed]
    if len(analysis.arms) <= CURVES:
        return [[*fixed, *others]]
    fair = []
    if main is not None:
        table = controls.GUIDED[controls.name_of(main)]
        wanted = (*table.even, *table.partly, *table.uneven)
        fair = [b for _, b in controls.pairs(analysis.arms) if controls.name_of(b) in wanted]
    fair = [a for a in dict.fromkeys(fair) if a in others]
    rest = [a for a in others if a not in fair]
    room = CURVES - len(fixed)
    parts = [part for arms in (fair, rest) if arms for part in np.array_split(arms, -(-len(arms) // room))]
    return [[*fixed, *map(str, part)] for part in parts]


def _lost(analysis: Analysis, model: str, arms: Sequence[str]) -> str:
    """Which runs are in no line: where the worst of an arm are lost, its line flatters it."""
    cells = [c for t in analysis.tasks for f in analysis.fractions if (c := analysis.cells.get((model, t, f)))]
    lost = [
        f"{arm} on {c.task} {held.lost} of {held.made} at {100 * c.fraction:g} %"
        for arm in arms
        for c in cells
        if (held := c.arms.get(arm)) and held.lost
    ]
    return f" Without a metric (diverged or failed), and in no line: {listing(lost)}." if lost else ""


def _curve(cells: Sequence[Cell], arm: str, band: bool) -> Curve:
    held = [(c.fraction, s) for c in cells if (a := c.arms.get(arm)) and (s := a.summary)]
    return Curve(arm, [f for f, _ in held], [s.mean for _, s in held], [s.quartiles for _, s in held], band)


def _effect(c: Comparison) -> Effect:
    s = c.pair.statistics
    kind = "same mean" if c.same_mean else "standard" if c.role == controls.STANDARD else "other"
    decided = c.verdict in (HELPS, HURTS)
    if s is None:
        return Effect(c.pair.b, kind, None, None, decided)
    return Effect(c.pair.b, kind, s.mean, s.t_interval, decided, s.differences)


def _forest_parts(
    analysis: Analysis, about: Sequence[Comparison], main: str
) -> Iterator[dict[str, dict[str, list[Effect]]]]:
    """Columns → tasks → rows, as many as fit a figure: a column a fraction, or a control if fractions are many."""
    fractions = [f for f in analysis.fractions if any(c.fraction == f for c in about)]
    names = list(dict.fromkeys(c.pair.b for c in about))
    turned = len(fractions) > _COLUMNS
    tasks = [t for t in (*analysis.tasks, None) if any(c.task == t for c in about)]
    heads: list[Any] = names if turned else fractions
    rows = [len(fractions if turned else names) + 2] * len(tasks)
    for i in range(0, len(heads), _COLUMNS):
        for part in _cut(dict.fromkeys(tasks), rows):
            columns = {
                f"{main} − {head}" if turned else f"{100 * head:g} % of the data": {
                    t or OVERALL: [
                        replace(_effect(c), label=f"{100 * c.fraction:g} %") if turned else _effect(c)
                        for c in about
                        if c.task == t and head == (c.pair.b if turned else c.fraction)
                    ]
                    for t in part
                }
                for head in heads[i : i + _COLUMNS]
            }
            if held := {title: rows for title, rows in columns.items() if any(rows.values())}:
                yield held


def _arm_runs(cell: Cell, main: str | None, by_place: dict[Any, list[Comparison]]) -> list[ArmRuns]:
    compared = {c.pair.b: _effect(c) for c in by_place.get((cell.model, cell.task, cell.fraction), [])}
    first = [main] if main in cell.arms else []
    names = dict.fromkeys([*first, *compared, *cell.arms])
    rows = []
    for name in names:
        arm = cell.arms[name]
        collapsed = [r.value for r in arm.runs if r.collapsed and r.value is not None]
        rows.append(ArmRuns(name, list(arm.values.values()), collapsed, arm.lost, compared.get(name)))
    return rows


def _cut(parts: dict[Any, Any], sizes: Sequence[int]) -> list[dict[Any, Any]]:
    """Neighbours together, as long as their sizes do not exceed a figure's rows."""
    cut: list[dict[Any, Any]] = []
    room = 0
    for (key, value), size in zip(parts.items(), sizes, strict=True):
        if not cut or size > room:
            cut.append({})
            room = _ROWS
        cut[-1][key] = value
        room -= size
    return cut


def _picture(figure: Any, name: str, alt: str, caption: str) -> Picture:
    return Picture(re.sub(r"[^\w.=+-]", "-", name), figure_svg(figure), alt, caption)
