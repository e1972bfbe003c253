"""What a person sees on the terminal: progress, the table of dropout sites, schedules."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from guided_dropout.schedule import DropoutSchedule
    from guided_dropout.schedule.compare import ScheduleDiff


def _on_a_terminal() -> bool:
    return sys.stdout is not None and sys.stdout.isatty()  # None: closed, as by `>&-`


# Piped output is not folded: nothing knows how wide it will be read. Brackets and colons are text: names hold them.
console = Console(soft_wrap=True, markup=False, emoji=False, width=None if _on_a_terminal() else 160)
errors = Console(stderr=True, soft_wrap=True, markup=False, emoji=False)
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_LEVELS = "▁▂▃▄▅▆▇█"
_BAR_CELLS, _FEWEST_BAR_CELLS = 24, 4
_GAP = 2
_NARROWEST_PATH = 12


class _Speed(ProgressColumn):
    """Steps per second, and tokens where those are counted."""

    def render(self, task: Task) -> Text:
        if not task.speed:
            return Text("")
        tokens = task.fields.get("tokens")
        speed = f"{task.speed:.1f}/s" + (f", {task.speed * tokens:,.0f} tokens/s" if tokens else "")
        return Text(speed, style="dim")


class _Left(ProgressColumn):
    """Time left: as told, or inferred from the speed so far."""

    def __init__(self) -> None:
        super().__init__()
        self._inferred = TimeRemainingColumn()

    def render(self, task: Task) -> Text:
        told = task.fields.get("left")
        return self._inferred.render(task) if told is None else Text(f"{duration(told)} left", style="cyan")


class Update(Protocol):
    """Tells a bar how far things are."""

    def __call__(
        self, done: int, total: int | None = None, *, tokens: float | None = None, left: float | None = None
    ) -> None:
        """Tell it.

        Args:
            done: steps.
            total: all steps; None where it stays as it was.
            tokens: per step, where those are counted.
            left: seconds, where they are known better than by the speed so far.
        """


@contextlib.contextmanager
def progress_bar(what: str, total: int | None, *, shown: bool = True) -> Iterator[Update]:
    """A bar that shows speed and time left, if the total is known; yields its update."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), _Speed(), _Left())
    # On a terminal below what is printed meanwhile; where that goes into a file or pipe, alone on stderr.
    on = console if _on_a_terminal() else errors
    hidden = not (shown and on.is_terminal)
    with Progress(*columns, console=on, transient=True, disable=hidden, speed_estimate_period=600) as bar:
        task = bar.add_task(what, total=total)

        def update(
            done: int, total: int | None = None, *, tokens: float | None = None, left: float | None = None
        ) -> None:
            bar.update(task, completed=done, total=total, tokens=tokens, left=left)

        yield update


def duration(seconds: float) -> str:
    """``"40 s"``, ``"12 min"``, ``"3.5 h"``, ``"4.2 days"``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def kept_whole(table: Table, *, folds: bool = False) -> Table:
    """The table, made such that however narrow the terminal is, nothing in it is cut off.

    Lines break between words, where a column does not forbid it; a table that is wider even so goes beyond the edge.

    Args:
        table: all of its rows added.
        folds: whether the first column, of paths, breaks anywhere, to spare the others.
    """
    for column in table.columns[folds:]:
        texts = [str(text) for text in (column.header, *column.cells)]
        parts = texts if column.no_wrap else [word for text in texts for word in text.split()]
        column.min_width = max(map(cell_len, parts), default=0)
    if folds:
        path = table.columns[0]
        path.no_wrap, path.overflow, path.min_width = False, "fold", _NARROWEST_PATH
    return table


def site_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows of `regularizers.dropout_table`, in the order in which the model runs through them.

    Columns: path (below what all sites of the backbone share) and kind; Fisher score; the rate that arrives now and the
    one in the schedule; how many tensors feed the site; calls per forward, where any site has more than one.
    """
    scored = any(row["score"] is not None for row in rows)
    scheduled = any(row["scheduled_rate"] is not None for row in rows)
    table = Table(box=None, header_style="bold", pad_edge=False)
    repeated = any(row["calls"] > 1 for row in rows)
    owners = [row["path"].split(".")[:-1] for row in rows if not row["in_head"]]
    common = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*owners, strict=False))
    shared = ".".join(level[0] for level in common)
    prefix = f"{shared}." if shared else ""
    table.add_column(f"dropout site of {shared}" if shared else "dropout site")
    table.add_column("kind", no_wrap=True)
    for name, shown in (("score", scored), ("rate", True), ("new", scheduled), ("from", True), ("calls", repeated)):
        if shown:
            table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cells = [row["path"].removeprefix(prefix), row["kind"]]
        if scored:
            cells.append(_score(row["score"]))
        cells.append(f"{row['rate']:.4g}")
        if scheduled:
            cells.append("kept" if row["scheduled_rate"] is None else f"{row['scheduled_rate']:.4f}")
        cells.append(str(len(row["parameters"])))
        if repeated:
            cells.append(str(row["calls"]))
        table.add_row(*cells, style="dim" if row["in_head"] else None)
    return kept_whole(table, folds=True)


def schedule_origin(schedule: DropoutSchedule) -> str:
    """What a schedule was made from, in lines."""
    model, profile, source = schedule.model, schedule.profile, schedule.derived_from
    made = f"shape {schedule.shape}, grouping {schedule.grouping}, aggregate {schedule.aggregate}"
    if source:
        own = "".join(f", {name} {source[name]}" for name in ("seed", "k") if name in source)
        made = f"{schedule.shape}{own}: control of schedule {source['digest']} ({_recipe(source)})"
    elif not any(score is not None for score in schedule.scores.values()):
        made = f"shape {schedule.shape}, no scores"
    lines = [
        f"{len(schedule.rates)} sites, mean rate {schedule.mean_rate:.4f}, "
        f"from {min(schedule.rates.values()):.4g} to {max(schedule.rates.values()):.4g}",
        made,
        f"model {model.get('name_or_path') or '?'} ({model.get('architecture')})",
    ]
    if profile:
        facts = (
            f"{profile['num_samples']:,} samples ({profile['objective']})",
            profile.get("text"),
            profile.get("date"),
        )
        lines.append(f"profile {profile.get('digest', '')}: ".replace(" :", ":") + ", ".join(filter(None, facts)))
    return "\n".join(lines)


def schedule_table(schedule: DropoutSchedule, width: int) -> Table:
    """Each site's kind, score and rate, as a number and as a bar as long as the rate, in the order of the sites.

    Args:
        schedule: whose.
        width: of the terminal; bars are as long as it has room for, and go first.
    """
    prefix = schedule.model.get("backbone_prefix", "")
    columns = {
        f"dropout site of {prefix.removesuffix('.')}" if prefix else "dropout site": [
            path.removeprefix(prefix) for path in schedule.rates
        ]
    }
    if schedule.kinds:
        columns["kind"] = [schedule.kinds.get(path, "–") for path in schedule.rates]
    if any(score is not None for score in schedule.scores.values()):
        columns["score"] = [_score(schedule.scores.get(path)) for path in schedule.rates]
    columns["rate"] = [f"{rate:.4f}" for rate in schedule.rates.values()]
    room = width - sum(max(map(cell_len, (name, *cells))) + _GAP for name, cells in columns.items())
    if room >= _FEWEST_BAR_CELLS:
        top = max(schedule.rates.values())
        whole = min(room, _BAR_CELLS)
        columns[""] = [_bar(rate / top if top else 0.0, whole) for rate in schedule.rates.values()]
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right" if name in ("score", "rate") else "left", no_wrap=True)
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    return kept_whole(table, folds=True)


def depth_chart(schedule: DropoutSchedule) -> Table:
    """The rates over depth: a line for the same place in each layer, a block as high as the rate for each layer."""
    from guided_dropout.schedule.places import by_role

    prefix = schedule.model.get("backbone_prefix", "")
    top = max(schedule.rates.values())
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("place")
    table.add_column(f"rate, first layer to last ({_LEVELS[0]} 0, {_LEVELS[-1]} {top:.4g})")
    for role, paths in by_role(schedule.rates).items():
        levels = (schedule.rates[path] / top if top else 0.0 for path in paths)
        blocks = "".join(_LEVELS[round(level * (len(_LEVELS) - 1))] for level in levels)
        table.add_row(role.removeprefix(prefix), blocks)
    return kept_whole(table, folds=True)


def diff_table(difference: ScheduleDiff) -> Table:
    """Per site: both rates, the change, and its place in each (1 is the most dropped)."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("dropout site")
    for name in ("A", "B", "B − A", "place in A", "in B"):
        table.add_column(name, justify="right")
    for site in difference.changes:
        a, b = site.rates
        table.add_row(site.name, f"{a:.4f}", f"{b:.4f}", f"{b - a:+.4f}", *(f"{rank:g}" for rank in site.ranks))
    return kept_whole(table, folds=True)


def _recipe(facts: Mapping[str, Any]) -> str:
    return f"{facts['shape']}, {facts['grouping']}, {facts['aggregate']}, mean {facts['mean_rate']:.4f}"


def _score(score: float | None) -> str:
    return "–" if score is None else f"{score:.1e}"


def _bar(share: float, cells: int) -> str:
    whole, eighths = divmod(round(share * cells * 8), 8)
    return _EIGHTHS[8] * whole + (_EIGHTHS[eighths] if eighths else "")
