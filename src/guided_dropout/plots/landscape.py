"""Figures of loss landscapes: curves, contours, surfaces, and what share of the parameters does what.

Each ``plot_…`` draws on the axes it is given, or on a new figure, and returns them. Heights are colours of cividis,
which are read alike by the colour-blind and in grey.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from string import ascii_lowercase
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import scipy.stats
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, FigureBase
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from mpl_toolkits.mplot3d.axes3d import Axes3D

from guided_dropout.errors import DataError
from guided_dropout.landscape.landscape import Landscape
from guided_dropout.landscape.masks import Mask
from guided_dropout.plots.figures import figure_of
from guided_dropout.plots.style import BLUE, GREY, INK, ORANGE, new_axes, plain, series

_HEIGHTS = "cividis"
_KINDS = {"all": (INK, "s", "-"), "top": (ORANGE, "o", "-"), "bottom": (BLUE, "D", "-."), "random": (GREY, "^", "--")}
_SHARES = {"top": "most informative", "random": "random", "bottom": "least informative"}
_LEVELS = 12
# Above this share of the finite losses the scale ends: a corner or two far up would leave no colour for the rest.
_TOP_QUANTILE = 0.98
_Array = npt.NDArray[np.float64]


def plot_curves(
    landscape: Landscape,
    ax: Axes | None = None,
    *,
    masks: Sequence[str] | None = None,
    top: float | None = None,
    legend: bool = True,
) -> Axes:
    """The loss along a line: the mean over the seeds, in a band that holds all of them.

    Args:
        landscape: of one dimension.
        ax: where to draw; a new figure if None.
        masks: names of those to draw; all if None.
        top: where the loss axis ends, in nats; a curve that rises above is cut.
        legend: whether to say which line is which.

    Raises:
        DataError: a plane, or an unknown mask.
    """
    _require(landscape, 1)
    ax = ax or new_axes(6.4, 4.0)
    for name in masks or ():
        landscape.surface(name)  # an unknown one is an error
    shown = [m for m in landscape.masks if masks is None or m.name in masks]
    steps = landscape.grid.steps
    for number, mask in enumerate(shown):
        color, line = _line(shown, number)
        values = np.stack([landscape.surface(mask, seed) for seed in landscape.seeds])
        if len(values) > 1:
            ax.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)
        ax.plot(steps, values.mean(0), color=color, linestyle=line, linewidth=1.6, label=mask.title)
    ax.plot(0, landscape.origin_loss, "o", color=INK, markersize=3.5, zorder=5)
    ax.set_xlim(steps[0], steps[-1])
    if top is not None:
        ax.set_ylim(top=top)
    ax.set_xlabel("step α along the direction")
    ax.set_ylabel("loss (nats)")
    if legend:
        ax.legend(frameon=False, fontsize=8.5, handlelength=2.8, ncols=2 if len(shown) > 5 else 1)
    plain(ax)
    return ax


def plot_contours(
    landscape: Landscape,
    ax: Axes | None = None,
    *,
    mask: str = "",
    seed: int | None = None,
    limits: tuple[float, float] | None = None,
    bar: bool = True,
) -> Axes:
    """A plane from above: filled contours, labelled lines, and the weights as they are in the middle.

    Args:
        landscape: of two dimensions.
        ax: where to draw; a new figure if None.
        mask: its name; the first if empty.
        seed: of the directions; the first if None.
        limits: lowest and highest loss of the colours; see `colour_limits`.
        bar: whether to draw the colour bar.

    Raises:
        DataError: a line, or an unknown mask or seed.
    """
    _require(landscape, 2)
    ax = ax or new_axes(5.0, 4.2)
    low, high = limits or colour_limits(landscape, [mask])
    steps, levels = landscape.grid.steps, _levels(low, high)
    losses = _finite(landscape.surface(mask, seed), high)
    filled = ax.contourf(steps, steps, losses, levels=levels, cmap=_HEIGHTS, extend="max")
    filled.set_edgecolor("face")  # no white seams between the colours
    lines = ax.contour(steps, steps, losses, levels=levels, colors="white", linewidths=0.5, alpha=0.75)
    for label in ax.clabel(lines, levels=levels[1:-1:2], fontsize=7.5, fmt="%.3g", colors=INK):
        label.set_path_effects([withStroke(linewidth=2, foreground="white", alpha=0.75)])
    ax.plot(0, 0, marker="+", color="white", markersize=9, markeredgewidth=1.6)
    ax.set_aspect("equal")
    ax.set_xlabel("α")
    ax.set_ylabel("β", rotation=0, labelpad=8)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.yaxis.set_major_locator(MaxNLocator(5))
    if bar:
        figure_of(ax).colorbar(filled, ax=ax, label="loss (nats)", shrink=0.86, format="%.3g")
    return ax


def plot_surface(
    landscape: Landscape,
    ax: Axes3D | None = None,
    *,
    mask: str = "",
    seed: int | None = None,
    limits: tuple[float, float] | None = None,
) -> Axes3D:
    """A plane in three dimensions.

    Args:
        landscape: of two dimensions.
        ax: three-dimensional axes; a new figure if None.
        mask: its name; the first if empty.
        seed: of the directions; the first if None.
        limits: lowest and highest loss of colours and axis; see `colour_limits`. What lies above is cut flat.

    Raises:
        DataError: a line, or an unknown mask or seed.
    """
    _require(landscape, 2)
    if ax is None:
        made: Any = Figure(figsize=(5.0, 4.4)).add_subplot(projection="3d")
        ax = made
    assert ax is not None
    low, high = limits or colour_limits(landscape, [mask])
    steps = landscape.grid.steps
    losses = np.minimum(_finite(landscape.surface(mask, seed), high), high)
    a, b = np.meshgrid(steps, steps)
    colours = matplotlib.colormaps[_HEIGHTS]
    ax.plot_surface(
        a, b, losses, cmap=colours, norm=Normalize(low, high), rstride=1, cstride=1, linewidth=0.15,
        edgecolor=(1, 1, 1, 0.35), antialiased=True, shade=False,
    )  # fmt: skip
    floor = low - 0.22 * (high - low)
    ax.contour(a, b, losses, levels=_levels(low, high), cmap=colours, norm=Normalize(low, high), zdir="z",
               offset=floor, linewidths=0.8)  # fmt: skip
    ax.set_zlim(floor, high)
    ax.set_xlabel("α", labelpad=-6)
    ax.set_ylabel("β", labelpad=-6)
    ax.zaxis.set_rotate_label(False)
    ax.set_zlabel("loss (nats)", rotation=90, labelpad=-2)
    ax.tick_params(pad=-2, labelsize=7)
    axes: list[Any] = [ax.xaxis, ax.yaxis, ax.zaxis]
    for axis in axes:
        axis.set_major_locator(MaxNLocator(4))
        axis.pane.set_facecolor("white")
        axis.pane.set_edgecolor("#cccccc")
        axis._axinfo["grid"].update(color="#e4e4e4", linewidth=0.6)
    ax.view_init(elev=28, azim=-58)
    zoom: Any = 1.08
    ax.set_box_aspect((1, 1, 0.78), zoom=zoom)
    return ax


def plot_shares(
    landscape: Landscape, ax: Axes | None = None, *, radius: float | None = None, equal_norm: bool = False
) -> Axes:
    """How much the loss rises at a radius when a share of the parameters moves: top, bottom and random ones.

    Points are means over the seeds, bars their 95 % t intervals.

    Args:
        landscape: with masks of several shares.
        ax: where to draw; a new figure if None.
        radius: as for `Landscape.rises`.
        equal_norm: draw the masks whose step is as long as the unmasked one; otherwise those that keep their own.

    Raises:
        DataError: no such masks, or no such radius.
    """
    ax = ax or new_axes(6.0, 3.9)
    chosen = [m for m in landscape.masks if m.kind != "all" and m.equal_norm == equal_norm]
    if not chosen:
        raise DataError(f"no masks of a share with equal_norm={equal_norm}; expected some, for instance top:0.5")
    radius = landscape.grid.radius if radius is None else radius
    for offset, kind in zip((0.96, 1.0, 1.04), ("top", "random", "bottom"), strict=True):
        own = sorted((m for m in chosen if m.kind == kind), key=lambda m: m.share)
        if not own:
            continue
        color, marker, line = _KINDS[kind]
        values = np.stack([landscape.rises(m, radius)[0] for m in own])
        halves = _half_intervals(values)
        ax.errorbar(
            [offset * m.share for m in own], values.mean(1), yerr=halves, color=color, marker=marker, linestyle=line,
            markersize=5.5, linewidth=1.3, capsize=2.5, elinewidth=1, label=kind,
        )  # fmt: skip
    whole = [m for m in landscape.masks if m.kind == "all"]
    if whole:
        ax.axhline(landscape.rises(whole[0], radius)[0].mean(), color=INK, linewidth=1, linestyle=":", label="all")
    ax.set_xscale("log")
    shares = sorted({m.share for m in chosen})
    ax.set_xticks(shares)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:g}"))
    if _differ_much(landscape, chosen, radius):
        ax.set_yscale("symlog", linthresh=0.01)
        ax.margins(y=0.1)
    if ax.dataLim.y0 > -1e-9:
        ax.set_ylim(bottom=0)
    ax.set_xlabel("share of the parameters that move (%)")
    ax.set_ylabel(f"rise of the loss at radius {radius:g} (nats)")
    ax.legend(frameon=False, fontsize=9, handlelength=2.8)
    plain(ax)
    return ax


def _differ_much(landscape: Landscape, masks: Sequence[Mask], radius: float) -> bool:
    """Whether the rises differ so much that a linear axis would hide the small ones."""
    means = [abs(float(landscape.rises(m, radius)[0].mean())) for m in masks]
    return max(means) > 30 * max(min(means), 1e-12)


def figure_planes(landscape: Landscape, *, masks: Sequence[str] | None = None, seed: int | None = None) -> Figure:
    """Figure 1 of the paper: each mask's surface, its contours below, all on one colour scale.

    Args:
        landscape: of two dimensions.
        masks: names of those to draw; all if None.
        seed: of the directions; the first if None.

    Raises:
        DataError: a line, or an unknown mask or seed.
    """
    _require(landscape, 2)
    names = [m.name for m in landscape.masks] if masks is None else list(masks)
    titles = {m.name: m.title for m in landscape.masks}
    limits = colour_limits(landscape, names)
    width = 3.5 * len(names) + 1.1
    figure = Figure(figsize=(width, 6.4))
    right = 1 - 1.15 / width
    grid = figure.add_gridspec(
        2, len(names), left=0.5 / width, right=right, top=0.93, bottom=0.075, height_ratios=(1.12, 1), hspace=0.12,
        wspace=0.2,
    )  # fmt: skip
    below: list[Axes] = []
    for column, name in enumerate(names):
        upper: Any = figure.add_subplot(grid[0, column], projection="3d")
        plot_surface(landscape, upper, mask=name, seed=seed, limits=limits)
        letter = ascii_lowercase[column : column + 1] or column + 1
        upper.set_title(f"{letter}  {titles.get(name, name)}", fontsize=11, y=1.03)
        lower = figure.add_subplot(grid[1, column])
        plot_contours(landscape, lower, mask=name, seed=seed, limits=limits, bar=False)
        if column:
            lower.set_ylabel("")
        below.append(lower)
    place = figure.add_axes((right + 0.25 / width, 0.085, 0.13 / width, 0.36))
    figure.colorbar(below[-1].collections[0], cax=place, label="loss (nats)", format="%.3g")
    return figure


def figure_lines(landscape: Landscape, *, equal_norm: bool | None = False) -> Figure:
    """Figure 2 of the paper: the loss along a line as fewer parameters move, with controls of the same size.

    A panel each for the top, random and bottom shares, on the same axes.

    Args:
        landscape: of one dimension.
        equal_norm: draw the masks whose step is as long as the unmasked one; otherwise those that keep their own; None
            draws all, in a row for each where there are both.

    Raises:
        DataError: a plane, or no such masks.
    """
    _require(landscape, 1)
    shares = [m for m in landscape.masks if m.kind != "all"]
    wanted = (False, True) if equal_norm is None else (equal_norm,)
    rows = [own for equal in wanted if (own := [m for m in shares if m.equal_norm == equal])]
    if not rows:
        raise DataError(f"no masks of a share with equal_norm={equal_norm}; expected some, for instance top:0.5")
    kinds = [kind for kind in _SHARES if any(m.kind == kind for own in rows for m in own)]
    figure = Figure(figsize=(3.6 * len(kinds) + 0.6, 3.7 if len(rows) == 1 else 4.0 * len(rows)), layout="constrained")
    letters = iter(ascii_lowercase)
    if len(rows) == 1:
        _draw_lines(figure, landscape, rows[0], kinds, letters)
        return figure
    parts: Any = figure.subfigures(len(rows), 1)
    for part, own in zip(parts, rows, strict=True):
        _draw_lines(part, landscape, own, kinds, letters)
        part.suptitle(
            "steps as long as the unmasked one" if own[0].equal_norm else "steps of their own length",
            x=0.01, ha="left", fontsize=11, weight="bold",
        )  # fmt: skip
    return figure


def _draw_lines(
    figure: FigureBase, landscape: Landscape, masks: Sequence[Mask], kinds: Sequence[str], letters: Iterator[str]
) -> None:
    """A row of `figure_lines`: a column for each kind, and no panel where none of the masks is of it."""
    whole = [m.name for m in landscape.masks if m.kind == "all"]
    names = [*whole, *(m.name for m in masks)]
    drawn = np.stack([landscape.surface(name, seed) for name in names for seed in landscape.seeds])
    high = max(drawn[np.isfinite(drawn)], default=landscape.origin_loss + 1)
    grid, first = figure.add_gridspec(1, len(kinds)), None
    for column, kind in enumerate(kinds):
        ordered = sorted((m for m in masks if m.kind == kind), key=lambda m: -m.share)
        if not ordered:
            continue
        ax = figure.add_subplot(grid[0, column], sharex=first, sharey=first)
        plot_curves(landscape, ax, masks=[*whole, *(m.name for m in ordered)], legend=False)
        handles = {m.name: line for m, line in zip(_shown(landscape, whole, ordered), ax.lines, strict=False)}
        labels = ["100 %"] * len(whole) + [f"{100 * m.share:g} %" for m in ordered]
        lines = [handles[n] for n in [*whole, *(m.name for m in ordered)]]
        ax.legend(lines, labels, frameon=False, fontsize=8, handlelength=2.6, title="moved", title_fontsize=8,
                  loc="upper center", ncols=2)  # fmt: skip
        ax.set_title(f"{next(letters)}  {_SHARES[kind]}", fontsize=11, loc="left")
        if first is not None:
            ax.set_ylabel("")
            ax.tick_params(labelleft=False)
        first = first or ax
    assert first is not None
    first.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    margin = 0.04 * (high - landscape.origin_loss)
    first.set_ylim(landscape.origin_loss - margin, high + 7 * margin)  # room for the legend


def figure_of_landscape(landscape: Landscape) -> Figure:
    """What suits it: planes side by side; lines by share; or all lines in one panel."""
    if landscape.grid.dims == 2:
        return figure_planes(landscape)
    if len({m.share for m in landscape.masks if m.kind != "all"}) > 1:
        return figure_lines(landscape, equal_norm=None)
    return figure_of(plot_curves(landscape))


def colour_limits(landscape: Landscape, masks: Sequence[str]) -> tuple[float, float]:
    """Lowest loss, and the one above which only 2 % of the points lie, over the masks named (the first if empty)."""
    grids = [landscape.surface(mask, seed).ravel() for mask in masks for seed in landscape.seeds]
    values = np.concatenate(grids)
    values = values[np.isfinite(values)]
    if not len(values):
        raise DataError("no finite loss; expected some: use a smaller --radius, or float32 weights")
    low, high = float(values.min()), float(np.quantile(values, _TOP_QUANTILE))
    return low, max(high, low + 1e-6 * max(1.0, abs(low)))


def _shown(landscape: Landscape, whole: Sequence[str], masks: Sequence[Mask]) -> list[Mask]:
    names = {*whole, *(m.name for m in masks)}
    return [m for m in landscape.masks if m.name in names]


def _line(masks: Sequence[Mask], number: int) -> tuple[Any, Any]:
    """Colour and line, different for each: black for all parameters; for shares of one kind the lighter the fewer."""
    mask = masks[number]
    if mask.kind == "all":
        return INK, "-"
    own = sorted((m for m in masks if m.kind == mask.kind), key=lambda m: (-m.share, m.equal_norm))
    if len(own) == 1:
        return _KINDS[mask.kind][0], _KINDS[mask.kind][2]
    place = own.index(mask)
    if len({m.kind for m in masks} - {"all"}) > 1:
        return _KINDS[mask.kind][0], series(place)[2]
    return matplotlib.colormaps["viridis"](0.8 * place / (len(own) - 1)), series(place)[2]


def _levels(low: float, high: float) -> _Array:
    levels = np.asarray(MaxNLocator(_LEVELS).tick_values(low, high))
    levels = levels[(levels > low) & (levels <= high)]
    return np.unique([low, *levels, high])


def _half_intervals(values: _Array) -> _Array | None:
    """[masks, seeds] → half the width of the 95 % t interval of each mean; None for fewer than three seeds."""
    n = values.shape[1]
    if n < 3:
        return None
    return np.asarray(scipy.stats.t.ppf(0.975, n - 1) * scipy.stats.sem(values, axis=1))


def _finite(losses: _Array, high: float) -> _Array:
    return np.where(np.isfinite(losses), losses, high + abs(high) + 1)


def _require(landscape: Landscape, dims: int) -> None:
    if landscape.grid.dims != dims:
        what = {1: "a line", 2: "a plane"}
        raise DataError(
            f"the landscape is {what[landscape.grid.dims]}; expected {what[dims]}: make it with --dims {dims}"
        )
