"""Figures of Fisher profiles and of how much text they need.

Each ``draw_…`` makes a `Figure` of its own. Profiles come as label → profile and are laid over one another, or one
below the other where that says more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from guided_dropout.errors import ArtefactError
from guided_dropout.fidelity.result import Fidelity
from guided_dropout.fisher.profile import FisherProfile
from guided_dropout.fisher.spectrum import Spectrum, spectrum
from guided_dropout.plots.style import GREY, INK, as_text, percent, plain, series
from guided_dropout.schedule.kinds import KINDS, Group, groups

Profiles = Mapping[str, FisherProfile]

_FISHER = "Fisher value (nats² / unit²)"
_RELATIVE = "Fisher value, of the average parameter's"
_LOOKS = {
    "embedding": ("#E69F00", ""),
    "attention": ("#56B4E9", "////"),
    "intermediate": ("#009E73", ""),
    "output": ("#CC79A7", "\\\\\\\\"),
    "norm": ("#F0E442", ".."),
    "head": ("#8a8a8a", ""),
    "other": ("#ffffff", "xx"),
}
_HATCHES = ("", "////", "..", "xx")


def draw_spectrum(profiles: Profiles, *, normalise: bool = False) -> Figure:
    """All values from the largest down (figure 3a, appendix A.1): on linear axes, and on logarithmic ones.

    Args:
        profiles: label → profile; of any size, as they are binned, not sorted.
        normalise: in units of the average parameter's value, so that models can be laid over one another.
    """
    figure = Figure(figsize=(9.2, 3.9), layout="constrained")
    linear, log = figure.subplots(1, 2)
    spectra = {label: spectrum(profile) for label, profile in profiles.items()}
    for number, (label, s) in enumerate(spectra.items()):
        unit = s.sums[-1] / s.num_parameters if normalise else 1.0
        share = np.array([1, *s.counts]) / s.num_parameters
        values = np.array([s.values[0], *s.values]) / unit
        color, _, line = series(number)
        for ax in (linear, log):
            ax.plot(share, values, color=color, linestyle=line, linewidth=1.8, label=as_text(label))
        linear.plot([share[-1], 1], [0, 0] if s.num_zeros else [values[-1]] * 2, color=color, linestyle=line)
    linear.set_xlim(-0.02, 1)
    linear.set_ylim(bottom=0)
    linear.xaxis.set_major_formatter(FuncFormatter(percent))
    _beginning(linear)
    log.set(xscale="log", yscale="log")
    _share_axis(log, min(1 / s.num_parameters for s in spectra.values()))
    for ax, title in ((linear, "linear axes"), (log, "logarithmic axes")):
        ax.set_xlabel("share of the parameters, largest value first")
        ax.set_title(title, fontsize=10, loc="left", color=INK)
        plain(ax)
    linear.set_ylabel(_RELATIVE if normalise else _FISHER)
    if len(profiles) > 1:
        log.legend(loc="lower left", frameon=False, fontsize=9, handlelength=3)
    return figure


def _beginning(ax: Axes) -> None:
    """On linear axes the curves hug both of them: an inset shows where they fall to a hundredth of the largest."""
    curves = [line for line in ax.lines if not str(line.get_label()).startswith("_")]
    data = [(np.asarray(line.get_xdata()), np.asarray(line.get_ydata())) for line in curves]
    largest = max(y.max() for _, y in data)
    ends = [x[y > largest / 100].max() for x, y in data if (y > largest / 100).any()]
    inset = ax.inset_axes((0.24, 0.3, 0.72, 0.62))
    for line, (x, y) in zip(curves, data, strict=True):
        inset.plot(x, y, color=line.get_color(), linestyle=line.get_linestyle(), linewidth=1.6)
    inset.set_xlim(0, max(ends))
    inset.set_ylim(bottom=0)
    inset.xaxis.set_major_locator(MaxNLocator(nbins=4))
    inset.xaxis.set_major_formatter(FuncFormatter(percent))
    inset.tick_params(labelsize=8)
    inset.set_title(f"the first {_two_digits(max(ends))}", fontsize=9, loc="right", color=INK)
    plain(inset)


def _two_digits(share: float) -> str:
    return percent(float(f"{share:.1e}"))


def draw_lorenz(profiles: Profiles) -> Figure:
    """How unevenly the Fisher information is spread: what the top k % hold, and the Lorenz curve with its Gini."""
    figure = Figure(figsize=(9.2, 3.9), layout="constrained")
    top, lorenz = figure.subplots(1, 2, width_ratios=(1.15, 1))
    spectra = {label: spectrum(profile) for label, profile in profiles.items()}
    for number, (label, s) in enumerate(spectra.items()):
        color, marker, line = series(number)
        low = 1 / s.num_parameters
        shares = np.geomspace(low, 1, 600)
        held = s.concentration(shares)
        top.plot(shares, held, color=color, linestyle=line, linewidth=1.8)
        marks = np.array([m for m in (0.0001, 0.001, 0.01, 0.1) if m > 5 * low])
        top.plot(marks, s.concentration(marks), marker, color=color, markersize=5.5)
        if len(spectra) == 1:
            for mark, h in zip(marks, s.concentration(marks), strict=True):
                top.annotate(
                    f"{percent(mark)} hold {100 * h:.0f} %", (mark, h), xytext=(-7, 3), textcoords="offset points",
                    ha="right", va="bottom", fontsize=8.5, color=INK,
                )  # fmt: skip
        x, y = lorenz_curve(s)
        lorenz.plot(
            x, y, color=color, linestyle=line, linewidth=1.8,
            label=as_text(f"{label}: Gini {s.gini:.3f}") if len(spectra) > 1 else f"Gini {s.gini:.3f}",
        )  # fmt: skip
    top.set_xscale("log")
    _share_axis(top, min(1 / s.num_parameters for s in spectra.values()))
    top.set_xlabel("share of the parameters, largest value first")
    top.set_ylabel("share of the total Fisher information")
    lorenz.plot([0, 1], [0, 1], color=GREY, linewidth=1, label="all parameters equal")
    lorenz.set_xlabel("share of the parameters, smallest value first")
    lorenz.set_xlim(0, 1)
    lorenz.xaxis.set_major_formatter(FuncFormatter(percent))
    for ax in (top, lorenz):
        ax.set_ylim(0, 1.02)
        ax.yaxis.set_major_formatter(FuncFormatter(percent))
        plain(ax)
    lorenz.legend(loc="upper left", frameon=False, fontsize=9, handlelength=3)
    return figure


def lorenz_curve(s: Spectrum) -> tuple[np.ndarray, np.ndarray]:
    """Shares of the parameters, smallest first, and of the total that they hold; both from 0 to 1."""
    share = np.array([0, *s.counts, s.num_parameters]) / s.num_parameters
    held = np.array([0.0, *s.sums, s.sums[-1]]) / s.sums[-1]
    return 1 - share[::-1], 1 - held[::-1]


def draw_layers(
    profiles: Profiles, *, measure: str = "share", normalise: bool = False, by_size: bool = False
) -> Figure:
    """The Fisher information by layer and kind of tensor (figure 3b, appendices A.2 and A.3).

    Args:
        profiles: label → profile; tensor means are enough.
        measure: ``"share"``: what a layer holds of the total, its kinds on top of each other, a panel for each profile;
            ``"mean"``: a parameter's value on average, a panel for each kind, the profiles side by side.
        normalise: means in units of the average parameter's value; shares have no unit.
        by_size: layers from the largest share down, not in the order of depth.

    Raises:
        ArtefactError: an unknown measure, means by size, or normalised shares.
    """
    grouped = {label: groups(profile) for label, profile in profiles.items()}
    if measure == "share":
        if normalise:
            raise ArtefactError(
                "normalise with the measure 'share', which has no unit; expected it with the measure 'mean': choose "
                "that, or leave normalise out"
            )
        return _shares(grouped, by_size)
    if measure != "mean" or by_size:
        raise ArtefactError(f"measure {measure!r}, by size {by_size}; expected share, or mean in the order of depth")
    return _means(grouped, normalise)


def draw_fidelity(result: Fidelity) -> Figure:
    """What sub-samples of a text are worth, over their number of samples: the schedule, and the parameters' values."""
    panels = bool(result.curve) + (2 if result.cells else 0)
    if not panels:
        raise ArtefactError(
            "neither an order of sites nor parameters were compared; expected one of them: nothing to draw"
        )
    figure = Figure(figsize=(1.2 + 4.1 * panels, 3.9), layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(1, panels)))
    if result.curve:
        _draw_schedules(axes.pop(0), result)
    if result.cells:
        _draw_cells(axes[0], result, "overlap", "overlap of the top sets (Jaccard)")
        _draw_cells(axes[1], result, "rms_error", "relative error (root mean square)")
        axes[0].set_ylim(0, 1.02)
        axes[1].set_yscale("log")
        _top_legend(axes[0], result)
    left = 0.8 * min([o.samples for o in result.orders] or [1])
    if result.recommended:
        left = min(left, 0.6 * result.recommended)  # room for what is written beside its line
    for ax in figure.axes:
        ax.set_xscale("log")
        ax.set_xlim(left, 1.25 * result.num_samples)
        low, high = ax.get_xlim()
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_xlabel(f"samples, of {result.num_samples:,}")
        plain(ax)
    return figure


def _draw_schedules(ax: Axes, result: Fidelity) -> None:
    assert result.curve is not None
    n, curve = result.curve["samples"], result.curve
    color, marker, _ = series(0)
    ax.fill_between(n, curve["lower"], 1, color=color, alpha=0.13, linewidth=0)
    ax.plot(n, curve["mean"], color=color, linewidth=1.8)
    ax.plot(n, curve["lower"], color=color, linewidth=1, linestyle="--")
    for order in result.orders:
        taus = [t for t in order.values["tau"] if t is not None]
        ax.plot([order.samples] * len(taus), taus, marker, color=color, markersize=4, alpha=0.75, markeredgewidth=0)
    ax.axhline(result.tau, color=GREY, linewidth=1)
    ax.annotate(
        f"{result.tau:g}", (1, result.tau), xycoords=ax.get_yaxis_transform(), xytext=(3, 0),
        textcoords="offset points", va="center", fontsize=8, color=INK, annotation_clip=False,
    )  # fmt: skip
    if result.recommended:
        other = series(1)[0]
        ax.axvline(result.recommended, color=other, linewidth=1.3)
        ax.annotate(
            f"{result.recommended:,} samples", (result.recommended, 0.04), xycoords=ax.get_xaxis_transform(),
            xytext=(-4, 0), textcoords="offset points", rotation=90, ha="right", fontsize=9, color=other,
        )  # fmt: skip
    low = min(*curve["lower"], *(t for o in result.orders for t in o.values["tau"] if t is not None), result.tau)
    low = np.floor(low * 10 - 0.3) / 10
    ax.set_ylim(low, 1 + 0.02 * (1 - low))
    ax.set_ylabel("Kendall's τ with the order of all samples")
    handles = [
        Line2D([], [], color=color, linewidth=1.8, label=f"mean of {curve['subsamples']} sub-samples"),
        Line2D([], [], color=color, linewidth=1, linestyle="--", label="95 % of them reach"),
        Line2D([], [], color=color, linestyle="", marker=marker, markersize=4, label="the draws of the table"),
    ]
    _above(ax, handles, 1)


def _draw_cells(ax: Axes, result: Fidelity, metric: str, label: str) -> None:
    for number, top in enumerate(result.tops):
        color, marker, line = series(number)
        cells = [cell for cell in result.cells if cell.top == top]
        known = [(c.samples, v) for c in cells for v in c.values[metric] if v is not None]
        means = {n: np.mean([v for m, v in known if m == n]) for n, _ in known}
        ax.plot(*zip(*known, strict=True), marker, color=color, markersize=3.5, alpha=0.45, markeredgewidth=0)
        ax.plot(list(means), list(means.values()), color=color, linestyle=line, linewidth=1.6)
    ax.set_ylabel(label)


def _top_legend(ax: Axes, result: Fidelity) -> None:
    handles = []
    for number, top in enumerate(result.tops):
        color, marker, line = series(number)
        handles.append(
            Line2D([], [], color=color, linestyle=line, marker=marker, markersize=4.5, label=f"top {percent(top)}")
        )
    _above(ax, handles, 2)


def _shares(grouped: Mapping[str, Sequence[Group]], by_size: bool) -> Figure:
    labels = {label: _depths(found) for label, found in grouped.items()}
    widest = max(len(places) for places in labels.values())
    width = min(max(6.4, 2.2 + 0.42 * widest), 14)
    figure = Figure(figsize=(width, 0.9 + 2.7 * len(grouped)), layout="constrained")
    kinds = [k for k in KINDS if any(g.place.kind == k for found in grouped.values() for g in found)]
    for ax, (label, found) in zip(np.atleast_1d(figure.subplots(len(grouped), 1)), grouped.items(), strict=True):
        whole = sum(g.total for g in found) or 1.0
        places = list(labels[label])
        held = {p: sum(g.total for g in found if _depth(g) == p) for p in places}
        if by_size:
            places.sort(key=lambda p: -held[p])
        bottom = np.zeros(len(places))
        for kind in kinds:
            heights = np.array(
                [sum(g.total for g in found if (_depth(g), g.place.kind) == (p, kind)) / whole for p in places]
            )
            color, hatch = _LOOKS[kind]
            ax.bar(
                range(len(places)), heights, 0.8, bottom=bottom, color=color, hatch=hatch, edgecolor=INK, linewidth=0.5
            )
            bottom += heights
        for x, share in enumerate(bottom):
            ax.annotate(
                f"{100 * share:.1f}", (x, share), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=7.5,
                color=INK,
            )  # fmt: skip
        _depth_ticks(ax, [labels[label][p] for p in places])
        ax.set_ylabel("share of the total Fisher")
        ax.yaxis.set_major_formatter(FuncFormatter(percent))
        ax.yaxis.set_major_locator(MaxNLocator(nbins=5))
        if len(grouped) > 1:
            ax.set_title(as_text(label), fontsize=10, loc="right", color=INK)
        plain(ax)
        ax.grid(axis="x", visible=False)
    handles = []
    for kind in kinds:
        color, hatch = _LOOKS[kind]
        handles.append(Patch(facecolor=color, hatch=hatch, edgecolor=INK, linewidth=0.5, label=kind))
    figure.legend(
        handles=handles, loc="outside upper center", ncols=max(3, int(width / 1.35)), frameon=False, fontsize=8.5,
        handlelength=2.2, columnspacing=1.4,
    )  # fmt: skip
    figure.axes[-1].set_xlabel(
        "layers, the largest share first" if by_size else "depth: layers in the order of the model"
    )
    return figure


def _means(grouped: Mapping[str, Sequence[Group]], normalise: bool) -> Figure:
    kinds = [k for k in KINDS if any(g.place.kind == k for found in grouped.values() for g in found)]
    depths: dict[tuple[str, int], str] = {}
    for found in grouped.values():
        depths = _merged(depths, _depths(found))
    columns = 2 if len(kinds) > 1 else 1
    rows = -(-len(kinds) // columns)
    figure = Figure(figsize=(min(columns * (1.6 + 0.27 * len(depths)), 14), 0.7 + 1.75 * rows), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns, sharex=True)).reshape(-1)
    width = 0.8 / len(grouped)
    for ax, kind in zip(axes, kinds, strict=False):
        for number, found in enumerate(grouped.values()):
            mean = sum(g.total for g in found) / sum(g.size for g in found) if normalise else 1.0
            # A place has one group of a kind.
            values = {_depth(g): g.mean / mean for g in found if g.place.kind == kind}
            x = np.array([list(depths).index(p) for p in values], dtype=float)
            ax.bar(
                x - 0.4 + (number + 0.5) * width, list(values.values()), width, edgecolor=INK, linewidth=0.5,
                color=series(number)[0] if len(grouped) > 1 else _LOOKS[kind][0],
                hatch=_HATCHES[number % 4] if len(grouped) > 1 else _LOOKS[kind][1],
            )  # fmt: skip
        ax.set_title(kind, fontsize=10, loc="left", color=INK)
        ax.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4), useMathText=True)
        ax.yaxis.set_major_locator(MaxNLocator(nbins=4))
        _depth_ticks(ax, list(depths.values()))
        plain(ax)
        ax.grid(axis="x", visible=False)
    for ax in axes[len(kinds) :]:
        ax.set_visible(False)
    for ax in axes[max(0, len(kinds) - columns) : len(kinds)]:
        ax.tick_params(labelbottom=True)
        ax.set_xlabel("depth")
    figure.supylabel(_RELATIVE + ", mean" if normalise else f"mean {_FISHER}", fontsize=10)
    if len(grouped) > 1:
        handles = [
            Patch(facecolor=series(i)[0], hatch=_HATCHES[i % 4], edgecolor=INK, linewidth=0.4, label=as_text(label))
            for i, label in enumerate(grouped)
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=3, frameon=False, fontsize=9)
    return figure


def _depth(group: Group) -> tuple[str, int]:
    """Sorts with -1 (before the layers) and a large number (after them) outside of any stack."""
    layer = group.place.layer
    return group.place.stack, 1 << 30 if layer is None else layer


def _depths(found: Sequence[Group]) -> dict[tuple[str, int], str]:
    """Places in the order of depth → what to call them: ``emb``, the layer's number, ``head``; stacks by name."""
    stacks = list(dict.fromkeys(g.place.stack for g in found if g.place.stack))
    names = dict(zip(stacks, _told_apart(stacks), strict=True))
    places = sorted(
        dict.fromkeys(_depth(g) for g in found),
        key=lambda p: (0 if p[1] == -1 else 2 if not p[0] else 1, stacks.index(p[0]) if p[0] else 0, p[1]),
    )
    labels = {}
    for stack, layer in places:
        number = str(layer)
        first = not any(s == stack for s, _ in labels)
        name = f"\n{names[stack]}" if stack and len(stacks) > 1 and first else ""
        labels[stack, layer] = "emb" if layer == -1 else "head" if not stack else number + name
    return labels


def _merged(one: dict[tuple[str, int], str], other: dict[tuple[str, int], str]) -> dict[tuple[str, int], str]:
    """The places of both, the embedding first and the head last; stacks as they come."""
    both = {**one, **other}
    stacks = ["", *dict.fromkeys(stack for stack, _ in both if stack)]
    ends = {p: 0 if p[1] == -1 else 2 if not p[0] else 1 for p in both}
    return {p: both[p] for p in sorted(both, key=lambda p: (ends[p], stacks.index(p[0]), p[1]))}


def _told_apart(stacks: Sequence[str]) -> list[str]:
    """``encoder`` and ``decoder`` of ``model.encoder.layers`` and ``model.decoder.layers``."""
    parts = [s.split(".") for s in stacks]
    odd = next((i for i in range(min(map(len, parts), default=0)) if len({p[i] for p in parts}) == len(parts)), 0)
    return [p[odd] for p in parts]


def _depth_ticks(ax: Axes, labels: Sequence[str]) -> None:
    ax.set_xticks(range(len(labels)), labels, fontsize=8)
    ax.set_xlim(-0.7, len(labels) - 0.3)


def _above(ax: Axes, handles: Sequence[Line2D | Patch], columns: int) -> None:
    ax.legend(
        handles=list(handles), loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, fontsize=8.5,
        handlelength=2.6, columnspacing=1.4,
    )  # fmt: skip


def _share_axis(ax: Axes, low: float) -> None:
    """A logarithmic axis of shares from one parameter to all; every other power of ten is named."""
    ax.set_xlim(low, 1)
    powers = [10.0**k for k in range(0, -12, -2) if 10.0**k >= low]
    ax.xaxis.set_major_locator(FixedLocator(powers))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(percent))
