"""Mistakes in one line."""

from __future__ import annotations

import re

_LONGEST = 300


def line(error: BaseException) -> str:
    """The error's class and the first line of its message, without paths of this machine."""
    text = next((row.strip() for row in str(error).splitlines() if row.strip()), "no message")
    text = re.sub(r"(?<![\w.])/\S*/(?=[^/\s]+)", "", text)
    return f"{type(error).__name__}: {text}"[:_LONGEST]
