"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

PROFILE_HELP = "a folder that `fisher` wrote, or user/name on the hub"
MODEL_HELP = "a local folder, a name on the hub, or 'demo' (embedded)"
_TEXT = typer.Option(
    help="Text to measure on: a UTF-8 file or folder (.txt, .jsonl, .gz, .xz), 'demo' (embedded), or "
    "hub:NAME[:CONFIG[:SPLIT[:COLUMN]]], a data set."
)

# What is measured, and on what
Model = Annotated[str, typer.Argument(metavar="MODEL", help=f"The model: {MODEL_HELP}.")]
Text = Annotated[str, _TEXT]
TextOrTask = Annotated[str | None, _TEXT]
Task = Annotated[str | None, typer.Option(help="Instead of a text: a task that MODEL was fine-tuned on.")]
TaskData = Annotated[str | None, typer.Option(help="The task's data, as for finetune.")]
ColumnNames = Annotated[
    str | None,
    typer.Option(
        metavar="text=NAME[,NAME]:label=NAME",
        help="Columns of a --data file or hub data set: one text or two, and the class, or score=NAME for a "
        "regression. Without it, text and label.",
    ),
]
EvalData = Annotated[str | None, typer.Option(metavar="FILE", help="Beside a --data file: one to evaluate on.")]
Metrics = Annotated[
    str,
    typer.Option(
        metavar="NAME[,NAME]",
        help="accuracy, f1, matthews_correlation; pearson, spearman. The first stands for the run. Without it, the "
        "task's: accuracy for classes, pearson for a regression.",
    ),
]
HubSplits = Annotated[
    str,
    typer.Option(
        metavar="TRAIN,EVALUATION",
        help="Splits of a hub data set; more to evaluate may follow. Without it, train and validation, or test.",
    ),
]
MaxCharacters = Annotated[
    int | None, typer.Option(help="Read no more of the text. Without it, 200 million to draw samples from.")
]
MaxLength = Annotated[int, typer.Option(help="Tokens per sample.")]
Seed = Annotated[int, typer.Option(help="Random seed.")]

# How
Objective = Annotated[
    str, typer.Option(help="auto, mlm (masked LM), causal (next token) or seq2seq (span corruption).")
]
BatchSize = Annotated[int, typer.Option(help="Samples per forward pass; changes speed and memory only.")]
TokensPerBatch = Annotated[
    int | None, typer.Option(help="Instead of --batch-size: tokens per forward pass at most, padding counted.")
]
Device = Annotated[str | None, typer.Option(help="For instance cpu or cuda:1; default: a GPU if any.")]
Dtype = Annotated[str, typer.Option(help="Of the weights while measuring: float32, bfloat16, float16, float64.")]
Resume = Annotated[bool | None, typer.Option(help="Go on with an unfinished run from OUT.checkpoint, or start afresh.")]
CheckpointEvery = Annotated[
    float, typer.Option(help="Seconds between two writes of OUT.checkpoint; 0 is after each batch.")
]

# Of dropout sites
Grouping = Annotated[str, typer.Option(help="Which parameters feed a site: owner or dataflow.")]
ResidualSites = Annotated[
    bool,
    typer.Option(
        "--residual-sites",
        help="Give a model that is built without it (Llama, Qwen, Gemma, Mistral) dropout on what each block writes to "
        "the residual stream.",
    ),
]
