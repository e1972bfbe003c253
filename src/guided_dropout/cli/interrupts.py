"""Signals that end a run at a point where nothing is lost."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """Not a KeyboardInterrupt, of which Typer would make its own message and exit code."""


def interrupt(*_: Any) -> None:
    """A handler that ends whatever is being done."""
    raise Interrupted


@contextlib.contextmanager
def interrupts_wait() -> Iterator[Callable[[], None]]:
    """Within, a signal waits for a call of what is yielded, which raises it; a second one does not wait."""
    asked = False

    def ask(*_: Any) -> None:
        nonlocal asked
        if asked:
            raise Interrupted
        asked = True

    def stop_if_asked() -> None:
        if asked:
            raise Interrupted

    before = {number: signal.signal(number, ask) for number in SIGNALS}
    try:
        yield stop_if_asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def resumable(state: Path, holds: Callable[[Path], bool], *, told: bool = True) -> Iterator[None]:
    """Within, an interrupt says how to go on from what was done.

    Args:
        state: the folder of an unfinished run.
        holds: whether one lies in it.
        told: whether this process tells; another of the same run ends with exit code 2 and leaves it to that one.

    Raises:
        Interrupted: the interrupt, with how to go on if there is something to go on from.
    """
    try:
        yield
    except Interrupted:
        if not told:
            sys.exit(2)
        if holds(state):
            raise Interrupted(
                f"the state is in {state}: run the same command with --resume to go on from there"
            ) from None
        raise
