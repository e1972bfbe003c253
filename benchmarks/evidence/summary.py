"""Draw all committed experiments in one figure: guided dropout against each control, where it was run.

python -m benchmarks.evidence.summary docs/figures/evidence.svg
"""

from __future__ import annotations

import csv
import sys
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from guided_dropout.plots.figures import figure_svg
from guided_dropout.plots.style import BLUE, GREY, INK, ORANGE, plain

RESULTS = Path(__file__).parents[1] / "results" / "evidence"
EXPERIMENTS = {
    "minilm-l6": "six-layer BERT",
    "minilm-l6-sst2": "six-layer BERT",
    "minilm-l6-stsb": "six-layer BERT",
    "demo": "embedded model",
    "demo-controls": "embedded model",
    "demo-sst2": "embedded model",
    "demo-sst2-mean10": "embedded model, rates up to 0.2",
    "smollm2-135m": "SmolLM2-135M",
    "smollm2-135m-rate3": "SmolLM2-135M, rates up to 0.03",
}
TASKS = {"cola": "CoLA", "rte": "RTE", "mrpc": "MRPC", "stsb": "STS-B", "sst2": "SST-2"}
CONTROLS = {
    "dropout": "plain dropout\n(twice the mean rate)",
    "uniform": "uniform\n(same mean)",
    "shuffled": "shuffled\n(same mean)",
    "reversed": "reversed\n(same mean)",
    "role-mean": "role-mean\n(same mean)",
    "top-only": "top-only\n(same mean)",
    "none": "no dropout",
}
_NARROW = 0.08  # a row whose intervals end within is drawn on the finer scale


@dataclass(frozen=True)
class Difference:
    """Guided minus a control: the mean, its 95 % interval, the number of pairs."""

    mean: float
    low: float
    high: float
    pairs: int

    @property
    def decided(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Row:
    """One experiment on one task.

    Attributes:
        label: model, task, share of the training data.
        effects: control → the difference to it.
    """

    label: str
    effects: dict[str, Difference]

    @property
    def reach(self) -> float:
        """The largest end of an interval."""
        return max(max(abs(d.low), abs(d.high)) for d in self.effects.values())


def read(results: Path = RESULTS) -> list[Row]:
    """The rows of all experiments that are there, in the order of `EXPERIMENTS`."""
    rows: dict[str, Row] = {}
    for name, model in EXPERIMENTS.items():
        file = results / name / "report" / "comparisons.csv"
        if not file.exists():
            continue
        with file.open(encoding="utf-8", newline="") as f:
            for found in csv.DictReader(f):
                if found["task"] not in TASKS or found["arm"] != "guided" or found["control"] not in CONTROLS:
                    continue
                label = f"{model}: {TASKS[found['task']]}, {100 * float(found['fraction']):g} %"
                row = rows.setdefault(label, Row(label, {}))
                mean, low, high = (float(found[key]) for key in ("mean", "t_low", "t_high"))
                # Plain dropout at the schedule's own mean is uniform dropout.
                is_uniform = found["control"] == "dropout" and found["same_mean"] == "True"
                control = "uniform" if is_uniform else found["control"]
                row.effects[control] = Difference(mean, low, high, int(found["pairs"]))
    return list(rows.values())


def draw(rows: list[Row]) -> Figure:
    """A column for each control, a row for each experiment and task; large effects have a scale of their own."""
    groups = [[r for r in rows if r.reach <= _NARROW], [r for r in rows if r.reach > _NARROW]]
    groups = [g for g in groups if g]
    heights = [len(g) + 0.6 for g in groups]
    figure = Figure(figsize=(13, 0.34 * len(rows) + 1.7), layout="constrained")
    axes = figure.subplots(
        len(groups), len(CONTROLS), squeeze=False, sharey="row", sharex="row", height_ratios=heights
    )  # fmt: skip
    for line, group in zip(axes, groups, strict=True):
        reach = 1.08 * max(r.reach for r in group)
        tick = float(f"{0.6 * reach:.1g}")
        for ax, control in zip(line, CONTROLS, strict=True):
            _draw(ax, group, control)
            ax.set_xlim(-reach, reach)
            ax.set_xticks([-tick, 0, tick], [f"−{tick:g}", "0", f"+{tick:g}"])
        line[0].set_yticks(range(len(group)), [_named(r) for r in group], fontsize=8.5)
        line[0].set_ylim(len(group) - 0.4, -0.6)
    for ax, title in zip(axes[0], CONTROLS.values(), strict=True):
        ax.set_title(f"guided − {title}", fontsize=9)
    figure.supxlabel(
        "difference in the task's metric with its 95 % interval; to the right guided is better; filled: the interval "
        "excludes zero",
        fontsize=8.5,
    )
    return figure


def _named(row: Row) -> str:
    pairs = sorted({d.pairs for d in row.effects.values()})
    return f"{row.label} ({'–'.join(map(str, pairs))} seeds)"


def _draw(ax: Axes, rows: list[Row], control: str) -> None:
    ax.axvline(0, color=INK, linewidth=0.9, zorder=1)
    for y, row in enumerate(rows):
        if control not in row.effects:
            ax.text(0.03, y, "not run", transform=ax.get_yaxis_transform(), fontsize=7, color=GREY, va="center")
            continue
        found = row.effects[control]
        color, marker, face = GREY, "o", "white"
        if found.decided:
            color, marker = (BLUE, "o") if found.mean > 0 else (ORANGE, "D")
            face = color
        ax.hlines(y, found.low, found.high, color=color, linewidth=1.6, zorder=2)
        ax.plot(found.mean, y, marker, color=color, markersize=5, markerfacecolor=face, zorder=3)
    plain(ax)
    ax.grid(axis="y", visible=False)
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.tick_params(axis="x", labelsize=7.5)


def main() -> None:
    """Results in, SVG out."""
    out = Path(sys.argv[1])
    out.write_text(figure_svg(draw(read())), encoding="utf-8")


if __name__ == "__main__":
    main()
