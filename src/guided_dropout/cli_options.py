"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

PROFILE_HELP = "a folder that `fisher` wrote, or user/name on the hub"
MODEL_HELP = "a local folder, a name on the hub, or 'demo' (embedded)"
Model = Annotated[str, typer.Argument(metavar="MODEL", help=f"The model: {MODEL_HELP}.")]
Seed = Annotated[int, typer.Option(help="Random seed.")]
ColumnNames = Annotated[
    str | None,
    typer.Option(
        metavar="text=NAME[,NAME]:label=NAME",
        help="Columns of a --data file or hub data set: one text or two, and the class, or score=NAME for a "
        "regression. Without it, text and label.",
    ),
]
ResidualSites = Annotated[
    bool,
    typer.Option(
        "--residual-sites",
        help="Give a model that is built without it (Llama, Qwen, Gemma, Mistral) dropout on what each block writes to "
        "the residual stream.",
    ),
]
