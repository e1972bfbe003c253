"""Figures, on matplotlib; no global state, no display needed.

Each ``plot_…`` draws on the ``ax`` it is given, or on a new figure of its own, and returns the `Axes`; its
`figure_of` can be saved or handed to `figure_svg`. Colours and lines: `style`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator
from mpl_toolkits.axes_grid1 import make_axes_locatable

from guided_dropout.artefacts import staged_file
from guided_dropout.errors import ArtefactError
from guided_dropout.fisher.profile import FisherProfile
from guided_dropout.fisher.spectrum import spectrum
from guided_dropout.plots.style import BLUE, GREY, INK, ORANGE, as_text, new_axes, percent, plain, series
from guided_dropout.schedule import DropoutSchedule, rates_from_scores
from guided_dropout.schedule.places import by_role, places

_KINDS = {"module": ("#56B4E9", ""), "attention": ("#F0E442", "////"), "attribute": ("#CC79A7", "xx")}


def plot_spectrum(profile: FisherProfile, ax: Axes | None = None) -> Axes:
    """The Fisher values sorted from the largest down, on logarithmic axes, and what the top 1 % of them holds.

    Args:
        profile: of any size; it is binned, not sorted (see `fisher.spectrum`).
        ax: where to draw; a new figure if None.
    """
    ax = ax or new_axes(6.4, 3.8)
    s = spectrum(profile)
    share = s.counts / s.num_parameters
    ax.loglog(share, s.values, color=BLUE, linewidth=1.8)
    top = s.top_share(0.01)
    ax.axvspan(share[0], 0.01, color=BLUE, alpha=0.12, linewidth=0)
    ax.axvline(0.01, color=GREY, linewidth=1, linestyle="--")
    ax.annotate(
        f"the top 1 % of the parameters\nholds {100 * top:.0f} % of the total",
        xy=(0.01, 0.06), xycoords=ax.get_xaxis_transform(), xytext=(-8, 0), textcoords="offset points",
        ha="right", va="bottom", fontsize=9, color=INK,
    )  # fmt: skip
    ax.set_xlim(share[0], 1)
    ax.xaxis.set_major_formatter(FuncFormatter(percent))
    ax.set_xlabel("share of the parameters, largest Fisher value first")
    ax.set_ylabel("Fisher value (nats² / unit²)")
    zeros = f", {100 * s.num_zeros / s.num_parameters:.1f} % of them exactly 0" if s.num_zeros else ""
    ax.set_title(f"{s.num_parameters:,} parameters{zeros}", fontsize=10, loc="left")
    plain(ax)
    return ax


def plot_layers(table: Sequence[Mapping[str, Any]], ax: Axes | None = None) -> Axes:
    """Each dropout site's Fisher score as a bar, in the order of the forward pass, with its rate in a panel beside.

    Args:
        table: rows as `regularizers.dropout_table` gives them; a site without a score gets no bar, and where no rate
            was scheduled the rate that the model has now is shown.
        ax: where to draw; a new figure of fitting height if None.
    """
    ax = ax or new_axes(7.2, 1.3 + 0.24 * len(table))
    rows = np.arange(len(table))
    scored = [row["score"] for row in table if row["score"]]
    floor = min(scored, default=1.0) / 3
    for y, row in enumerate(table):
        color, hatch = _KINDS[row["kind"]]
        if row["score"]:
            ax.barh(y, row["score"] - floor, left=floor, color=color, hatch=hatch, edgecolor=INK, linewidth=0.6)
        else:  # on a logarithmic axis 0 has no bar either
            told = "no score" if row["score"] is None else "0"
            ax.text(0.02, y, told, transform=ax.get_yaxis_transform(), va="center", fontsize=8, color=GREY)
    ax.set_xscale("log")
    ax.set_xlim(left=floor)
    ax.set_ylim(len(table) - 0.4, -0.6)
    ax.set_yticks(rows, _short([row["path"] for row in table]), fontsize=8)
    ax.set_xlabel("Fisher score (nats² / unit²)")
    plain(ax)
    ax.grid(axis="y", visible=False)
    _kind_legend(ax, [row["kind"] for row in table])
    _rate_panel(ax, rows, [_shown_rate(row) for row in table])
    return ax


def plot_schedule(schedule: DropoutSchedule, ax: Axes | None = None) -> Axes:
    """The rates over depth: the sites in the order of the forward pass, a line for the same place in each layer.

    Args:
        schedule: of any model; the layers' numbers are read from the paths.
        ax: where to draw; a new figure of fitting size if None.
    """
    paths = list(schedule.rates)
    roles = by_role(paths)
    columns = 2 if len(roles) > 6 and len(paths) > 30 else 1
    ax = ax or new_axes(min(4.2 + 0.12 * len(paths), 14), 3.2 + 0.17 * len(roles) / columns)
    prefix = schedule.model.get("backbone_prefix", "")
    for number, (role, members) in enumerate(roles.items()):
        color, marker, line = series(number)
        kinds = dict.fromkeys(schedule.kinds[path] for path in members if path in schedule.kinds)
        ax.plot(
            [paths.index(path) for path in members], [schedule.rates[path] for path in members],
            color=color, marker=marker, linestyle=line, linewidth=1.3, markersize=5.5,
            label=as_text(role.removeprefix(prefix)) + (f" ({', '.join(kinds)})" if kinds else ""),
        )  # fmt: skip
    ax.axhline(schedule.mean_rate, color=GREY, linewidth=1, zorder=1)
    ax.annotate(
        f"mean {schedule.mean_rate:.4g}", (1, schedule.mean_rate), xycoords=ax.get_yaxis_transform(),
        xytext=(4, 0), textcoords="offset points", va="center", fontsize=8, color=INK, annotation_clip=False,
    )  # fmt: skip
    layers = [place.layer for place in places(paths).values()]
    starts = [i for i, layer in enumerate(layers) if layer is not None and (i == 0 or layers[i - 1] != layer)]
    ax.set_xticks(starts, [str(layers[i]) for i in starts])
    ax.set_xlabel("dropout sites in the order of the forward pass; numbers: first site of each layer")
    ax.set_ylabel("dropout rate")
    ax.set_ylim(bottom=-0.03 * max(*schedule.rates.values(), 0.01))
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, fontsize=8, handlelength=3.5)
    plain(ax)
    return ax


def plot_shapes(
    scores: Mapping[str, float],
    shapes: Sequence[str] = ("linear", "cosine", "exponential", "step", "proportional"),
    ax: Axes | None = None,
) -> Axes:
    """The rates that each shape makes of the same scores, from the least informative site to the most.

    Args:
        scores: path → score.
        shapes: as for `rates_from_scores`.
        ax: where to draw; a new figure if None.
    """
    ax = ax or new_axes(6.8, 3.8)
    ranked = sorted(scores, key=scores.__getitem__)
    for number, shape in enumerate(shapes):
        rates = rates_from_scores(scores, shape=shape)
        color, marker, line = series(number)
        ax.plot(
            [rates[path] for path in ranked], color=color, marker=marker, linestyle=line, linewidth=1.3, markersize=4.5,
            label=shape,
        )  # fmt: skip
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("site k, in ascending order of its score")
    ax.set_ylabel("dropout rate")
    ax.legend(loc="upper right", frameon=False, fontsize=9, handlelength=3.5)
    plain(ax)
    return ax


def plot_paired(results: Sequence[Any], ax: Axes | None = None) -> Axes:
    """The metric of every run by arm; a thin line joins the runs of a seed, a bar marks the arm's mean.

    Args:
        results: `finetune.RunResult` of one task and metric; arms stand in the order of their first run. Runs without
            a metric (diverged) leave a gap.
        ax: where to draw; a new figure if None.
    """
    arms = list(dict.fromkeys(r.arm for r in results))
    ax = ax or new_axes(1.6 + 1.5 * len(arms), 3.8)
    values = {(r.arm, r.seeds): np.nan if r.value is None else r.value for r in results}
    for seed in dict.fromkeys(r.seeds for r in results):
        line = [values.get((arm, seed), np.nan) for arm in arms]
        ax.plot(line, color=GREY, linewidth=0.9, marker="o", markersize=5, markerfacecolor="white", zorder=2)
    for x, arm in enumerate(arms):
        held = [v for (a, _), v in values.items() if a == arm and np.isfinite(v)]
        if held:
            mean = float(np.mean(held))
            ax.hlines(mean, x - 0.22, x + 0.22, color=ORANGE, linewidth=3, zorder=3)
            ax.annotate(
                f"{mean:.3f}", (x + 0.24, mean), fontsize=9, va="center", color=ORANGE, zorder=4,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6},
            )  # fmt: skip
    ax.set_xticks(range(len(arms)), arms)
    ax.set_xlim(-0.5, len(arms) - 0.3)
    ax.set_ylabel(results[0].metric if results else "metric")
    ax.yaxis.set_major_locator(MaxNLocator(nbins=6))
    handles = [
        Line2D([], [], color=GREY, linewidth=0.9, marker="o", markersize=5, markerfacecolor="white", label="one seed"),
        Line2D([], [], color=ORANGE, linewidth=3, label="mean"),
    ]
    ax.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=9)
    plain(ax)
    ax.grid(axis="x", visible=False)
    return ax


def figure_of(ax: Axes) -> Figure:
    """The whole figure that `ax` stands on."""
    figure = ax.get_figure(root=True)
    assert isinstance(figure, Figure)
    return figure


def figure_svg(figure: Figure) -> str:
    """The figure as one ``<svg>`` element, the same for the same figure, with no reference to anything outside."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "guided-dropout", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write the figure, all or nothing, as the ending of `path` says, ``.png``, ``.svg`` or ``.pdf``; return the path.

    Raises:
        ArtefactError: another ending, or `path` cannot be written.
    """
    path = Path(path)
    check_figure_name(path)
    with staged_file(path) as tmp:
        if path.suffix == ".svg":
            tmp.write_text(figure_svg(figure), encoding="utf-8")
        elif path.suffix == ".pdf":
            figure.savefig(tmp, format="pdf", metadata={"CreationDate": None})
        else:
            figure.savefig(tmp, format="png", dpi=150)
    return path


def check_figure_name(path: str | Path) -> None:
    """Make sure, before any long work, that a figure can be drawn to `path`.

    Raises:
        ArtefactError: its ending names no format.
    """
    if Path(path).suffix not in (".png", ".svg", ".pdf"):
        raise ArtefactError(f"cannot draw to {path}; expected a name that ends in .png, .svg or .pdf")


def _short(paths: Sequence[str]) -> list[str]:
    """The paths without the leading parts that all of them share."""
    parts = [p.split(".") for p in paths]
    while len(parts) > 1 and all(len(p) > 1 and p[0] == parts[0][0] for p in parts):
        parts = [p[1:] for p in parts]
    return [".".join(p) for p in parts]


def _shown_rate(row: Mapping[str, Any]) -> float:
    return row["rate"] if row["scheduled_rate"] is None else row["scheduled_rate"]


def _kind_legend(ax: Axes, kinds: Sequence[str]) -> None:
    handles = [
        Patch(facecolor=color, hatch=hatch, edgecolor=INK, linewidth=0.6, label=kind)
        for kind, (color, hatch) in _KINDS.items()
        if kind in kinds
    ]
    ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=9)


def _rate_panel(ax: Axes, rows: np.ndarray, rates: Sequence[float]) -> None:
    panel = make_axes_locatable(ax).append_axes("right", size="34%", pad=0.4, sharey=ax)
    panel.hlines(rows, 0, rates, color=ORANGE, linewidth=1)
    panel.plot(rates, rows, "D", color=ORANGE, markersize=4.5, clip_on=False)
    panel.set_xlim(0, max([*rates, 0.01]) * 1.08)
    panel.tick_params(axis="y", length=0, labelleft=False)
    panel.xaxis.set_major_locator(MaxNLocator(nbins=3))
    panel.xaxis.set_major_formatter(FuncFormatter(percent))
    panel.set_xlabel("dropout rate")
    plain(panel)
