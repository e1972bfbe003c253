"""What a person sees of a loss landscape on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from guided_dropout.cli.console import kept_whole

if TYPE_CHECKING:
    from guided_dropout.landscape import Landscape
    from guided_dropout.landscape.compare import Number
    from guided_dropout.stats import Interval


def landscape_origin(landscape: Landscape) -> str:
    """What a landscape was made from, in lines."""
    grid, made = landscape.grid, landscape.directions
    how = ", ".join(f"{key} {made[key]}" for key in ("normalise", "vectors", "mask_level") if key in made)
    seeds = landscape.seeds
    drawn = f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds from {seeds[0]} to {seeds[-1]}"
    shape = f"{grid.points} points on [-{grid.radius:g}, {grid.radius:g}]" + (" squared" if grid.dims == 2 else "")
    text = landscape.provenance.get("text") or landscape.provenance.get("task")
    skipped = landscape.provenance.get("skipped") or 0
    without = f", {skipped:,} without a target skipped" if skipped else ""
    return "\n".join(
        [
            f"{landscape.title}: loss {landscape.origin_loss:.4f} nats at the weights as they are",
            f"{shape}; directions {made['kind']} ({how}), {drawn}",
            f"{landscape.num_samples:,} samples ({landscape.objective})" + (f" of {text}" if text else "") + without,
        ]
    )


def landscape_table(landscape: Landscape, *, level: float) -> Table:
    """Each mask: how many parameters it moves how far, and its numbers, means over the seeds with 95 % intervals."""
    from guided_dropout.landscape.compare import measures, numbers

    found = {(n.mask, n.measure): n for n in numbers(landscape, level=level)}
    shown = measures(landscape, level=level)
    interval = " [95 %]" if len(landscape.seeds) > 2 else ""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("mask", no_wrap=True)
    for title in ("moved", "length", *(m.name + interval for m in shown)):
        table.add_column(title, justify="right")
    for i, mask in enumerate(landscape.masks):
        cells = [mask.name, f"{landscape.moved[i, 0]:,}", f"{landscape.lengths[i, :, 0].mean():.3g}"]
        for measure in shown:
            cells.append(number_text(found[mask.name, measure.name]))
        table.add_row(*cells)
    return kept_whole(table)


def difference_table(landscape: Landscape, *, level: float) -> Table | None:
    """Masks of the same share against each other, seed by seed; None where there is nothing to compare."""
    from guided_dropout.landscape.compare import differences

    found = differences(landscape, level=level) if len(landscape.seeds) > 2 else []
    if not found:
        return None
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("mask", "against", "in"):
        table.add_column(name)
    table.add_column("difference [95 %]", justify="right")
    table.add_column("")
    for d in found:
        cells = [d.first, d.second, d.measure, _with(d.comparison.mean, d.comparison.t_interval, sign="+")]
        table.add_row(*cells, d.verdict, style=None if d.verdict in ("more", "less") else "dim")
    table.caption = f"{len(found)} intervals, each at 95 %, not corrected for their number"
    return kept_whole(table)


def number_text(number: Number) -> str:
    """Mean and interval; ``≥`` before what meets the grid's edge; in words why there is none."""
    if number.summary is None:
        return number.why_not or "none"
    return f"{'≥ ' * number.at_least}{_with(number.summary.mean, number.summary.interval)}"


def _with(mean: float, interval: Interval | None, *, sign: str = "") -> str:
    around = f" [{interval[0]:{sign}.3g}, {interval[1]:{sign}.3g}]" if interval else ""
    return f"{mean:{sign}.3g}{around}"
