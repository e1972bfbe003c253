"""An analysis as CSV: a row for each run, each arm, each comparison."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from guided_dropout.artefacts import write_text
from guided_dropout.bench.analysis import Analysis, Comparison
from guided_dropout.bench.arms import STATUSES
from guided_dropout.bench.folder import Run
from guided_dropout.bench.phrases import failure_line
from guided_dropout.errors import ArtefactError

OVERALL = "mean over tasks"


def write_csv(folder: Path, analysis: Analysis) -> list[Path]:
    """Write ``runs.csv``, ``arms.csv`` and ``comparisons.csv``; return their paths."""
    tables = {
        "runs.csv": [_run(run) for run in analysis.runs],
        "arms.csv": _arms(analysis),
        "comparisons.csv": [_comparison(c, analysis) for c in (*analysis.comparisons, *analysis.overall)],
    }
    for name, rows in tables.items():
        write_text(folder / name, _csv(rows))
    return [folder / name for name in tables]


def write_comparisons(file: Path, found: Sequence[Comparison], analysis: Analysis) -> Path:
    """Write comparisons in the columns of ``comparisons.csv``; return the path.

    Raises:
        ArtefactError: the file is there and has other columns, or it cannot be written.
    """
    table = _csv([_comparison(c, analysis) for c in found])
    _check_replaceable(file, table.partition("\n")[0])
    write_text(file, table)
    return file


def _check_replaceable(file: Path, header: str) -> None:
    if not file.is_file():
        return
    try:
        with open(file, "rb") as there:
            begins = there.read(len(header.encode()) + 1).rstrip(b"\r\n")
    except OSError as e:
        raise ArtefactError(f"cannot read {file}, which is there: {e.strerror}; choose another name") from e
    if begins not in (b"", header.encode()):
        raise ArtefactError(
            f"{file} is there already and begins with {begins.decode(errors='replace').splitlines()[0][:60]!r}; "
            "expected a new file, or one of comparisons to replace: choose another name"
        )


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    columns = dict.fromkeys(column for row in rows for column in row)
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _run(run: Run) -> dict[str, Any]:
    k, r = run.key, run.result
    row = {"model": k.model, "task": k.task, "fraction": k.fraction, "arm": k.arm, "seed": k.seed, "status": run.status}
    if r is None:
        return {**row, "metric": None, "value": None, "error": failure_line(run)}
    last = r.history[-1] if r.history else {}
    return {
        **row,
        "metric": r.metric,
        "value": r.value,
        "error": None,
        **{f"metric:{name}": value for name, value in r.metrics.items()},
        "train_loss": last.get("train_loss"),
        "eval_loss": last.get("eval_loss"),
        "mean_rate": r.rates.get("mean"),
        "n_train": r.recipe.get("n_train"),
        "n_eval": r.recipe.get("n_eval"),
        "seconds": r.times.get("total"),
        "device": r.provenance.get("device"),
    }


def _arms(analysis: Analysis) -> list[dict[str, Any]]:
    rows = []
    for cell in analysis.cells.values():
        for arm in cell.arms.values():
            s = arm.summary
            rows.append(
                {
                    "model": cell.model,
                    "task": cell.task,
                    "fraction": cell.fraction,
                    "arm": arm.name,
                    "metric": cell.metric,
                    **{status: arm.counts[status] for status in STATUSES},
                    "mean_rate": arm.mean_rate,
                    "n": s.n if s else 0,
                    "mean": s and s.mean,
                    **_bounds("interval", s and s.interval),
                    "median": s and s.median,
                    **_bounds("quartile", s and s.quartiles),
                    "maximum": s and s.maximum,
                }
            )
    return rows


def _comparison(c: Comparison, analysis: Analysis) -> dict[str, Any]:
    s = c.pair.statistics
    return {
        "model": c.model,
        "task": c.task or OVERALL,
        "fraction": c.fraction,
        "arm": c.pair.a,
        "control": c.pair.b,
        "role": c.role,
        "same_mean": c.same_mean,
        "tasks": c.tasks,
        "verdict": c.verdict,
        "margin": analysis.margin,
        "confidence": analysis.confidence,
        "pairs": s.n if s else 0,
        "left_out": c.pair.left_out,
        "lost_arm": c.pair.lost[0],
        "lost_control": c.pair.lost[1],
        "mean": s and s.mean,
        **_bounds("t", s and s.t_interval),
        **_bounds("bca", s and s.bca_interval),
        **_bounds("t_with_lost", c.pair.with_lost and c.pair.with_lost.t_interval),
        "median": s and s.median,
        **_bounds("quartile", s and s.quartiles),
        "better_in": c.pair.better,
        "probability_of_improvement": c.pair.probability,
        "t_p": s and s.t_p,
        "t_p_holm": c.t_holm,
        "t_p_holm_with_lost": c.t_holm_with_lost,
        "wilcoxon_p": s and s.wilcoxon_p,
        "wilcoxon_p_holm": c.wilcoxon_holm,
        "detectable": s and s.detectable,
    }


def _bounds(name: str, interval: tuple[float, float] | None) -> dict[str, float | None]:
    low, high = interval or (None, None)
    return {f"{name}_low": low, f"{name}_high": high}
