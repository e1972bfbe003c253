"""Figures of an experiment with many tasks, arms and fractions of the training data.

They have several panels, so each ``plot_…`` returns a whole `Figure`, for `plots.save_figure` or `plots.figure_svg`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from guided_dropout.plots.style import BLUE, GREY, INK, ORANGE, SERIES, percent, plain, series

CURVES = len(SERIES)
"""How many curves a panel can hold and stay readable."""

# Kind of effect → colour, marker.
_KINDS = {
    "standard": (ORANGE, "D", "standard dropout"),
    "same mean": (BLUE, "o", "a control at the same mean rate"),
    "other": (INK, "s", "another arm"),
}
_ROW = 0.215  # inches


@dataclass(frozen=True)
class Curve:
    """An arm over the fractions of the training data.

    Attributes:
        label: the arm.
        fractions: in (0, 1].
        means: of the metric.
        quartiles: 25th and 75th percentile of the metric.
        band: whether to show them.
    """

    label: str
    fractions: Sequence[float]
    means: Sequence[float]
    quartiles: Sequence[tuple[float, float]]
    band: bool = False


@dataclass(frozen=True)
class Effect:
    """A difference between two arms.

    Attributes:
        label: the arm that it is compared with.
        kind: ``"standard"``, ``"same mean"`` or ``"other"``.
        mean: of the differences; None where no seed has both.
        interval: of the mean.
        decided: whether the verdict is that it helps or hurts.
        differences: seed by seed.
    """

    label: str
    kind: str
    mean: float | None
    interval: tuple[float, float] | None
    decided: bool
    differences: Sequence[float] = ()


@dataclass(frozen=True)
class ArmRuns:
    """The runs of an arm on one task at one fraction.

    Attributes:
        label: the arm.
        values: metric of each run that has one.
        collapsed: those of them that predict one class.
        lost: number of runs without a metric.
        effect: of the guided arm against this one; None for the guided arm itself.
    """

    label: str
    values: Sequence[float]
    collapsed: Sequence[float]
    lost: int
    effect: Effect | None


def plot_curves(panels: Mapping[str, Sequence[Curve]], metrics: Mapping[str, str]) -> Figure:
    """The metric over the fraction of the training data: a panel for each task, a line for each arm.

    Args:
        panels: task → curves; the same arms in the same order in each, at most `CURVES`.
        metrics: task → name of its metric.
    """
    columns = {1: 1, 2: 2, 4: 2}.get(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(max(5.2, 3.15 * columns), 2.5 * rows + 0.75), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)  # pyright: ignore
    labels = list(dict.fromkeys(c.label for curves in panels.values() for c in curves))
    fractions = sorted({f for curves in panels.values() for c in curves for f in c.fractions})
    for number, (task, curves) in enumerate(panels.items()):
        ax = figure.add_subplot(rows, columns, number + 1)
        for curve in curves:
            color, marker, line = series(labels.index(curve.label))
            emphasis = 1.0 if curve.band else 0.0
            if curve.band and curve.quartiles:
                low, high = zip(*curve.quartiles, strict=True)
                ax.fill_between(curve.fractions, low, high, color=color, alpha=0.15, linewidth=0)
            ax.plot(
                curve.fractions, curve.means, color=color, marker=marker, linestyle=line, markersize=4.5,
                linewidth=1.2 + 0.6 * emphasis, zorder=3 + emphasis, markeredgecolor="white", markeredgewidth=0.4,
            )  # fmt: skip
        _fraction_axis(ax, fractions)
        ax.yaxis.set_major_locator(MaxNLocator(nbins=5))
        ax.set_title(task, fontsize=10, loc="left", fontweight="bold")
        ax.set_ylabel(metrics[task], fontsize=9)
        ax.tick_params(labelsize=8)
        plain(ax)
    figure.supxlabel("share of the training data", fontsize=9)
    handles = []
    for number, label in enumerate(labels):
        color, marker, line = series(number)
        handles.append(Line2D([], [], color=color, marker=marker, linestyle=line, markersize=5, label=label))
    figure.legend(
        handles=handles, loc="outside upper center", ncols=min(len(handles), 4), frameon=False, fontsize=9,
        handlelength=3.2,
    )  # fmt: skip
    return figure


def plot_forest(
    columns: Mapping[str, Mapping[str, Sequence[Effect]]], *, arm: str, margin: float | None = None
) -> Figure:
    """The difference that an arm makes, with its interval: a row for each task and control.

    Args:
        columns: fraction of the training data, as text → task → effects; tasks and controls need not be the same.
        arm: what is compared with the controls.
        margin: largest difference that does not matter; shaded.
    """
    rows: dict[str, list[str]] = {}
    for tasks in columns.values():
        for task, effects in tasks.items():
            known = rows.setdefault(task, [])
            known += [e.label for e in effects if e.label not in known]
    places, headings, y = {}, {}, 0.0
    for task, labels in rows.items():
        headings[task] = y
        for label in labels:
            y += 1
            places[task, label] = y
        y += 1.6
    everything = [e for tasks in columns.values() for effects in tasks.values() for e in effects]
    limits = _limits(everything, margin)
    height = _ROW * (y + 0.4) + 1.25
    alone = len(columns) == 1
    figure = Figure(figsize=(7.4 if alone else 1.7 + 2.35 * len(columns), height), layout="constrained")
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for ax, (title, tasks) in zip(panels, columns.items(), strict=True):
        _zero(ax, margin)
        for task, effects in tasks.items():
            for effect in effects:
                _draw_effect(ax, effect, places[task, effect.label], limits, numbers=alone)
        ax.set_xlim(*limits)
        ax.set_ylim(y - 0.6, -0.8)
        ax.set_title(title, fontsize=9.5, loc="left")
        ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
        ax.tick_params(labelsize=8)
        plain(ax)
        ax.grid(axis="y", visible=False)
        ax.spines["left"].set_visible(False)
        ax.tick_params(axis="y", length=0)
    ticks = sorted([(place, label, False) for (_, label), place in places.items()]
                   + [(place, task, True) for task, place in headings.items()])  # fmt: skip
    panels[0].set_yticks([place for place, _, _ in ticks], [text for _, text, _ in ticks], fontsize=8.5)
    for text, (_, _, heading) in zip(panels[0].get_yticklabels(), ticks, strict=True):
        text.set_fontweight("bold" if heading else "normal")
    figure.supxlabel(f"{arm} − control, in the metric's own unit (to the right: {arm} is better)", fontsize=9)
    _effect_legend(figure, everything)
    return figure


def plot_runs(panels: Mapping[str, Sequence[ArmRuns]], *, arm: str | None, metric: str) -> Figure:
    """Each run of one task: the metric by arm on the left, and beside it the differences seed by seed.

    Args:
        panels: fraction of the training data, as text → arms, in the order of the rows.
        arm: the guided one; None where there is none, and then there are no differences.
        metric: name of the metric.
    """
    sizes = [len(arms) for arms in panels.values()]
    columns = 1 if arm is None else 2
    figure = Figure(figsize=(7.6, sum(_ROW * 1.1 * n + 0.58 for n in sizes) + 1.0), layout="constrained")
    grid = figure.subplots(len(panels), columns, sharey="row", squeeze=False, height_ratios=[n + 0.8 for n in sizes])
    for axes, (title, arms) in zip(grid, panels.items(), strict=True):
        values = axes[0]
        for differences in axes[1:]:
            differences.sharex(grid[0][1])
        _draw_values(values, arms, arm)
        for differences in axes[1:]:
            _zero(differences, None)
            for y, runs in enumerate(arms):
                if runs.effect is not None:
                    _draw_differences(differences, runs.effect, y)
        values.set_yticks(range(len(arms)), [runs.label for runs in arms], fontsize=8.5)
        for text in values.get_yticklabels():
            text.set_fontweight("bold" if text.get_text() == arm else "normal")
        values.set_ylim(len(arms) - 0.4, -0.6)
        values.set_title(title, fontsize=9.5, loc="left")
        for ax in axes:
            plain(ax)
            ax.grid(axis="y", visible=False)
            ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
            ax.tick_params(labelsize=8)
            ax.tick_params(axis="y", length=0)
    grid[-1][0].set_xlabel(f"{metric} of each run", fontsize=9)
    if arm is not None:
        grid[-1][1].set_xlabel(f"{arm} − arm, seed by seed", fontsize=9)
    _runs_legend(figure, panels)
    return figure


def _fraction_axis(ax: Axes, fractions: Sequence[float]) -> None:
    """Few fractions stand apart evenly on a logarithmic axis, with a tick each; many are a scale."""
    if len(fractions) <= 5:
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(FixedLocator(list(fractions)))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xlim(fractions[0] / 1.15, fractions[-1] * 1.15)
    else:
        ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
        ax.set_xlim(0, fractions[-1] * 1.04)
    ax.xaxis.set_major_formatter(FuncFormatter(percent))


def _limits(effects: Sequence[Effect], margin: float | None) -> tuple[float, float]:
    """Ends of the axis: all means fit, and all intervals but those that would dwarf the others."""
    intervals = [e.interval for e in effects if e.interval]
    means = [e.mean for e in effects if e.mean is not None]
    reach = sorted(max(abs(low), abs(high)) for low, high in intervals)
    most = 4 * reach[len(reach) // 2] if reach else 0.0
    held = [0.0, *means, *(m * sign for m in [margin or 0.0] for sign in (-1, 1))]
    held += [math.copysign(min(abs(bound), most), bound) for bounds in intervals for bound in bounds]
    room = 0.06 * max(max(held) - min(held), 1e-6)
    return min(held) - room, max(held) + room


def _zero(ax: Axes, margin: float | None) -> None:
    if margin is not None:
        ax.axvspan(-margin, margin, color=GREY, alpha=0.18, linewidth=0, zorder=0)
    ax.axvline(0, color=INK, linewidth=0.9, zorder=1)


def _draw_effect(ax: Axes, effect: Effect, y: float, limits: tuple[float, float], *, numbers: bool) -> None:
    color, marker, _ = _KINDS[effect.kind]
    if effect.interval is not None:
        low, high = effect.interval
        left, right = limits
        ax.hlines(y, max(low, left), min(high, right), color=color, linewidth=1.5, zorder=2)
        for beyond, edge, arrow in ((low < left, left, "<"), (high > right, right, ">")):
            if beyond:
                ax.plot(edge, y, marker=arrow, color=color, markersize=5, clip_on=False, zorder=3)
    if effect.mean is not None:
        face = color if effect.decided else "white"
        ax.plot(
            effect.mean, y, marker=marker, markersize=5.5, color=color, markerfacecolor=face, zorder=4, linestyle="none"
        )
    if numbers:
        text = "no pairs" if effect.mean is None else f"{_signed(effect.mean)}"
        if effect.interval is not None:
            text += f"  [{', '.join(map(_signed, effect.interval))}]"
        ax.text(1.02, y, text, transform=ax.get_yaxis_transform(), va="center", fontsize=8, color=INK)


def _draw_values(ax: Axes, arms: Sequence[ArmRuns], guided: str | None) -> None:
    for y, runs in enumerate(arms):
        fine = list(runs.values)
        for value in runs.collapsed:
            fine.remove(value)
        ax.plot(fine, y + _spread(fine), "o", markersize=3.6, color=GREY, markerfacecolor="white", markeredgewidth=0.8)
        ax.plot(runs.collapsed, y + _spread(runs.collapsed), "x", markersize=4, color=INK, markeredgewidth=1)
        if runs.values:
            color = BLUE if runs.label == guided else INK
            ax.vlines(float(np.mean(runs.values)), y - 0.36, y + 0.36, color=color, linewidth=2.4, zorder=4)
        if runs.lost:
            ax.annotate(
                f"{runs.lost} lost", (1, y), xycoords=ax.get_yaxis_transform(), xytext=(3, 0),
                textcoords="offset points", va="center", fontsize=7.5, color=INK, annotation_clip=False,
            )  # fmt: skip
    for runs in arms:
        if runs.label == guided and runs.values:
            ax.axvline(float(np.mean(runs.values)), color=BLUE, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)


def _draw_differences(ax: Axes, effect: Effect, y: float) -> None:
    color, marker, _ = _KINDS[effect.kind]
    d = list(effect.differences)
    ax.plot(d, y + _spread(d), "o", markersize=3.2, color=GREY, markerfacecolor="white", markeredgewidth=0.7, zorder=2)
    if effect.interval is not None:
        ax.hlines(y, *effect.interval, color=color, linewidth=1.8, zorder=3)
    if effect.mean is not None:
        face = color if effect.decided else "white"
        ax.plot(effect.mean, y, marker=marker, markersize=5.5, color=color, markerfacecolor=face, zorder=4)


def _spread(values: Sequence[float]) -> np.ndarray:
    """Vertical places around a row such that neighbouring dots do not hide each other."""
    places = np.zeros(len(values))
    if len(values) < 2:
        return places
    near = float(np.ptp(values)) / 30
    order = np.argsort(values, kind="stable")
    last, run = -math.inf, 0
    for i in order:
        run = run + 1 if values[i] - last <= near else 0
        last = values[i]
        places[i] = (0.0, 0.16, -0.16, 0.3, -0.3)[run % 5]
    return places


def _kind_handles(effects: Sequence[Effect], words: str) -> list[Line2D]:
    return [
        Line2D([], [], color=color, marker=marker, markersize=5.5, markerfacecolor="white", label=f"{words} {name}")
        for kind, (color, marker, name) in _KINDS.items()
        if any(e.kind == kind for e in effects)
    ]


def _effect_legend(figure: Figure, effects: Sequence[Effect]) -> None:
    handles = _kind_handles(effects, "against")
    handles.append(Line2D([], [], color=GREY, marker="o", markersize=5.5, label="filled: helps or hurts"))
    figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False, fontsize=8.5)


def _runs_legend(figure: Figure, panels: Mapping[str, Sequence[ArmRuns]]) -> None:
    rows = [runs for arms in panels.values() for runs in arms]
    handles = [
        Line2D([], [], color=GREY, marker="o", markersize=4, markerfacecolor="white", linestyle="none", label="a run")
    ]
    if any(runs.collapsed for runs in rows):
        handles.append(Line2D([], [], color=INK, marker="x", markersize=4.5, linestyle="none", label="a collapsed run"))
    handles.append(Line2D([], [], color=INK, linewidth=2.4, label="mean of an arm"))
    handles += _kind_handles([runs.effect for runs in rows if runs.effect], "difference to")
    figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False, fontsize=8.5)


def _signed(x: float) -> str:
    return f"{x:+.4f}".replace("-", "−")
