"""What the commands share: groups with a default command, names turned into things."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from typer.core import TyperGroup

from guided_dropout.errors import DataError, unknown


class MakeByDefault(TyperGroup):
    """A group in which ``group X …`` is short for ``group make X …``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put ``make`` first where no command stands."""
        if args and args[0] not in {*self.commands, "--help"}:
            typo = not Path(args[0]).exists() and difflib.get_close_matches(args[0], self.commands)
            args = args if typo else ["make", *args]
        return super().parse_args(ctx, args)


def choose(option: str, given: str, meaning: Mapping[str, Any]) -> Any:
    """What `given` means.

    Raises:
        DataError: none of the names in `meaning`.
    """
    if given not in meaning:
        raise DataError(unknown(option, given, meaning))
    return meaning[given]
