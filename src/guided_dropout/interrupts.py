"""Signals that end a run at a point where nothing is lost."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
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
