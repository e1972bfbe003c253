"""What a person sees on the terminal: progress and the table of dropout sites."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

# Piped output is not folded: nothing knows how wide it will be read.
console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 160)
errors = Console(stderr=True, soft_wrap=True)


class _Speed(ProgressColumn):
    """Steps per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "", style="dim")


@contextlib.contextmanager
def progress_bar(what: str, total: int | None) -> Iterator[Callable[[int, int | None], None]]:
    """A bar that shows speed and time left; yields ``update(done, total)``, a `total` of None leaves it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Speed(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task(what, total=total)

        def update(done: int, total: int | None = None) -> None:
            bar.update(task, completed=done, total=total)

        yield update


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
    table.add_column(f"dropout site of {shared}" if shared else "dropout site", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    for name, shown in (("score", scored), ("rate", True), ("new", scheduled), ("from", True), ("calls", repeated)):
        if shown:
            table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cells = [row["path"].removeprefix(prefix), row["kind"]]
        if scored:
            cells.append("–" if row["score"] is None else f"{row['score']:.1e}")
        cells.append(f"{row['rate']:.4g}")
        if scheduled:
            cells.append("kept" if row["scheduled_rate"] is None else f"{row['scheduled_rate']:.4f}")
        cells.append(str(len(row["parameters"])))
        if repeated:
            cells.append(str(row["calls"]))
        table.add_row(*cells, style="dim" if row["in_head"] else None)
    return table
