"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

ResidualSites = Annotated[
    bool,
    typer.Option(
        "--residual-sites",
        help="Give a model that is built without it (Llama, Qwen, Gemma, Mistral) dropout on what each block writes to "
        "the residual stream.",
    ),
]
