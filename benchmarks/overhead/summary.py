"""The rounds as ratios, and the ratios as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.overhead.measure import COPIES, CYCLE
from guided_dropout.artefacts import read_json

KIND, SCHEMA = "overhead", 2
YARDSTICK = "dropout"


def ratios(rounds: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Copy → median and quartiles over the rounds of its seconds over the yardstick's in the same round.

    The interval is the percentile bootstrap's for the median, 95 %.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in COPIES:
        if name == YARDSTICK:
            continue
        values = np.array([seconds[name] / seconds[YARDSTICK] for seconds in rounds])
        low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
        interval = stats.bootstrap((values,), np.median, method="percentile", rng=np.random.default_rng(0))
        found[name] = {
            "median": float(middle),
            "q25": float(low),
            "q75": float(high),
            "interval_95": [float(bound) for bound in interval.confidence_interval],
        }
    return found


def seconds(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Copy → median seconds of a step."""
    return {name: float(np.median([r[name] for r in rounds])) for name in COPIES}


def load(folder: Path) -> list[dict[str, Any]]:
    """The result files, by name."""
    return [read_json(path, kind=KIND, schema=SCHEMA) for path in sorted(folder.glob("*/*.json"))]


def summary(folder: Path) -> str:
    """The page."""
    files = load(folder)
    lines = ["# What guided dropout costs in a training step", ""]
    if not any(f["rounds"] for f in files):
        return "\n".join([*lines, "Nothing has been measured yet."]) + "\n"
    lines += [
        "One step is forward, backward and AdamW. Copies of one classifier take it in turn on the same batch, in all",
        f"orders one after another ({CYCLE} rounds). A ratio is the median over the rounds of a copy's seconds over",
        f"those of `{YARDSTICK}` in the same round, with its quartiles, and a 95 % bootstrap interval for the median.",
        "Compiled copies are one graph each, compiled for their own rates.",
        "",
        *(f"- `{name}`: {text}" for name, text in COPIES.items()),
        "",
        "`python -m benchmarks.overhead`, from the top of the checkout; stopped and started again, it goes on.",
    ]
    for f in files:
        lines += ["", *_section(f)]
    return "\n".join(lines) + "\n"


def _section(f: Mapping[str, Any]) -> Iterable[str]:
    setting, rounds, sessions = f["setting"], f["rounds"], f["sessions"]
    dates = [session["provenance"]["date"][:10] for session in sessions]
    transformers = sessions[-1]["provenance"]["versions"].get("transformers")
    yield f"## {setting['model']}, {setting['mode']}, {setting['device']}"
    yield ""
    yield (
        f"{setting['batch_size']} texts of {setting['length']} tokens; {setting['sites']} sites; {len(rounds)} rounds "
        f"in {len(sessions)} sessions; {setting['processor']}, {setting['threads']} threads; torch {setting['torch']}, "
        f"transformers {transformers}; {min(dates)} to {max(dates)}; "
        f"load before {max(session['load_before'] for session in sessions):.1f} at most."
    )
    yield ""
    yield "| copy | rates | ms a step | ratio [quartiles] | 95 % interval |"
    yield "|---|---|---|---|---|"
    found, took = ratios(rounds), seconds(rounds)
    for name in COPIES:
        low, high = setting["rates"][name]
        rates = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
        row = [f"`{name}`", rates, f"{1000 * took[name]:.2f}"]
        if r := found.get(name):
            bounds = r["interval_95"]
            row += [f"{r['median']:.4f} [{r['q25']:.4f}, {r['q75']:.4f}]", f"{bounds[0]:.4f} to {bounds[1]:.4f}"]
        else:
            row += ["1", ""]
        yield f"| {' | '.join(row)} |"
