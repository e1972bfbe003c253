"""What was run in an experiment, and what became of it: arms, tasks, statuses, failures."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from guided_dropout.bench.analysis import Analysis
from guided_dropout.bench.arms import STATUSES
from guided_dropout.bench.document import Block, Bullets, Details, Heading, Paragraph, Table
from guided_dropout.bench.experiment_verdicts import place_cells, place_head
from guided_dropout.bench.folder import Run
from guided_dropout.bench.phrases import NOTHING, count, failure_line, metric_name
from guided_dropout.bench.sections import facts_line, meaning


def what_became(analysis: Analysis) -> list[Block]:
    """Runs by status, and the failures."""
    by_arm: dict[str, Counter[str]] = defaultdict(Counter)
    for run in analysis.runs:
        by_arm[run.key.arm][run.status] += 1
    missing = None if analysis.missing is None else Counter(key.arm for key in analysis.missing)
    header = ["arm", *STATUSES, *(["not made yet"] if missing is not None else [])]
    rows = []
    for arm in analysis.arms:
        to_come = [] if missing is None else [f"{missing[arm]:,}"]
        rows.append([arm, *(f"{by_arm[arm][s]:,}" for s in STATUSES), *to_come])
    blocks: list[Block] = [
        Heading("What became of the runs"),
        Table(header, rows),
        Paragraph(
            "Collapsed: all predictions are one class; such a run has a metric and counts like any other. Diverged: a "
            "loss became infinite or NaN. Failed: an error, given below. Diverged and failed runs have no metric."
        ),
    ]
    odd = _odd_cells(analysis)
    if odd.rows:
        blocks.append(Details(f"Where runs collapsed, diverged or failed: {count(len(odd.rows), 'place')}", [odd]))
    failures: dict[str, list[Run]] = defaultdict(list)
    for run in analysis.runs:
        if run.failure is not None:
            failures[failure_line(run)].append(run)
    if failures:
        table = [[line, f"{len(runs):,}", _some(runs)] for line, runs in failures.items()]
        blocks += [Heading("Failures", 3), Table(["error", "runs", "which"], table, text_columns=(0, 2))]
    return blocks


def _odd_cells(analysis: Analysis) -> Table:
    rows = []
    for cell in analysis.cells.values():
        for arm in cell.arms.values():
            if arm.counts["ok"] < arm.made:
                place = place_cells(analysis, cell.model, cell.fraction, cell.task)
                rows.append([*place, arm.name, *(str(arm.counts[s]) for s in STATUSES)])
    head = place_head(analysis)
    return Table([*head, "arm", *STATUSES], rows, text_columns=range(len(head) + 1))


def _some(runs: Sequence[Run]) -> str:
    names = [f"`{run.key.name}`" for run in runs[:3]]
    return ", ".join(names) + (", …" if len(runs) > 3 else "")


def what_was_run(analysis: Analysis, facts: Mapping[str, Any]) -> list[Block]:
    """Recipe, models, tasks and arms.

    Args:
        analysis: of the runs.
        facts: what all runs share, as in `Experiment.facts`.
    """
    lines = []
    if facts.get("recipe"):
        lines.append(f"Recipe: {facts_line(facts['recipe'])}.")
    for label, model in (facts.get("models") or {}).items():
        schedule = model.get("schedule") or {}
        known = {k: schedule[k] for k in ("shape", "grouping", "aggregate", "mean_rate", "digest") if k in schedule}
        lines.append(f"Model {label}{f': schedule {facts_line(known)}' if known else ': no schedule'}.")
    for task in analysis.tasks:
        sizes = []
        for fraction in analysis.fractions:
            result = next((a.runs[0] for (_, t, f), cell in analysis.cells.items() if (t, f) == (task, fraction)
                           for a in cell.arms.values() if a.runs), None)  # fmt: skip
            if result is not None:
                sizes.append((f"{result.recipe.get('n_train', 0):,}", result))
        if sizes:
            r = sizes[0][1]
            lines.append(
                f"Task {task}: {metric_name(r.metric)}; {' / '.join(n for n, _ in sizes)} training examples "
                f"({r.recipe.get('train_data')}), {r.recipe.get('n_eval', 0):,} to evaluate on "
                f"({r.recipe.get('eval_data')})."
            )
    rows = []
    for arm in analysis.arms:
        rates = {round(a.mean_rate, 4) for cell in analysis.cells.values() for n, a in cell.arms.items()
                 if n == arm and a.mean_rate is not None}  # fmt: skip
        seconds = [r.result.times["total"] for r in analysis.runs if r.key.arm == arm and r.result]
        shown = f"{min(rates):.4f}" + (f" to {max(rates):.4f}" if len(rates) > 1 else "") if rates else NOTHING
        rows.append([arm, meaning(arm), shown, f"{statistics.median(seconds):.0f} s" if seconds else NOTHING])
    return [
        Heading("What was run"),
        Paragraph(
            "Runs of the same seed start from the same weights and see the same batches, whatever their arm. The "
            "metric is that on the evaluation data after the last epoch; more is better."
        ),
        Bullets(lines),
        Table(["arm", "what it is", "mean rate", "median time of a run"], rows, text_columns=(0, 1)),
    ]
