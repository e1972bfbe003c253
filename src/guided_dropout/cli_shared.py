"""What the commands share: arguments, groups with a default command, names turned into things."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from guided_dropout.errors import DataError, unknown

if TYPE_CHECKING:
    from guided_dropout.texts import Text

PROFILE_HELP = "a folder that `fisher` wrote, or user/name on the hub"
MODEL_HELP = "a local folder, a name on the hub, or 'demo' (embedded)"
Model = Annotated[str, typer.Argument(metavar="MODEL", help=f"The model: {MODEL_HELP}.")]
Seed = Annotated[int, typer.Option(help="Random seed.")]


class MakeByDefault(TyperGroup):
    """A group in which ``group X …`` is short for ``group make X …``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: D102
        if args and args[0] not in {*self.commands, "--help"}:
            typo = not Path(args[0]).exists() and difflib.get_close_matches(args[0], self.commands)
            args = args if typo else ["make", *args]
        return super().parse_args(ctx, args)


def open_text(text: str, max_characters: int | None) -> Text:
    """``demo``, a file, a folder or a hub data set → its paragraphs; see `texts.stream_text`."""
    from guided_dropout.texts import Text, stream_text

    if text != "demo":
        return stream_text(text, max_characters=max_characters)
    from guided_dropout.demo.text import demo_paragraphs

    return Text(text, lambda: iter(demo_paragraphs()), max_characters)


def choose(option: str, given: str, meaning: Mapping[str, Any]) -> Any:
    """What `given` means.

    Raises:
        DataError: none of the names in `meaning`.
    """
    if given not in meaning:
        raise DataError(unknown(option, given, meaning))
    return meaning[given]
