"""What a person sees on the terminal: progress and the table of dropout sites."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

console = Console()
errors = Console(stderr=True, soft_wrap=True)


class _Speed(ProgressColumn):
    """Steps per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "", style="dim")


@contextlib.contextmanager
def progress_bar(what: str, total: int | None) -> Iterator[Callable[[int, int | None], None]]:
    """A bar that shows speed and time left; yields ``update(done, total)``, where `total` may be None to leave it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Speed(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task(what, total=total)

        def update(done: int, total: int | None = None) -> None:
            bar.update(task, completed=done, **({} if total is None else {"total": total}))

        yield update


def site_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows of `regularizers.dropout_table`, in the order in which the model runs through them."""
    scored = any(row["score"] is not None for row in rows)
    scheduled = any(row["scheduled_rate"] is not None for row in rows)
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("dropout site", overflow="fold")
    table.add_column("kind")
    table.add_column("calls", justify="right")
    table.add_column("fed by", justify="right")
    if scored:
        table.add_column("Fisher score", justify="right")
    table.add_column("rate now", justify="right")
    if scheduled:
        table.add_column("scheduled", justify="right")
    for row in rows:
        cells = [row["path"], row["kind"], str(row["calls"]), _tensors(row["parameters"])]
        if scored:
            cells.append("–" if row["score"] is None else f"{row['score']:.2e}")
        cells.append(f"{row['rate']:.4g}")
        if scheduled:
            cells.append("as is" if row["scheduled_rate"] is None else f"{row['scheduled_rate']:.4f}")
        table.add_row(*cells, style="dim" if row["in_head"] else None)
    return table


def _tensors(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'' if len(names) == 1 else 's'}"
