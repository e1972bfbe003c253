"""The command line's `finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from guided_dropout.cli.console import console, progress_bar
from guided_dropout.cli.options import ColumnNames, EvalData, HubSplits, Metrics, Model, ResidualSites, Seed
from guided_dropout.recipe import Recipe


class ArmsInHelp(TyperCommand):
    """A command whose help ends in the arms, a line each, with their parameters and defaults."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Look them up now: importing them takes seconds, which only this help is worth."""
        from guided_dropout.arms import ARMS

        lines = ["Arms, with their parameters (plain dropout besides, where they do not set it):"]
        for name, arm in ARMS.items():
            parameters = ", ".join(f"{key}={value:g}" for key, value in arm.parameters.items())
            lines.append(f"{name:<16} {arm.summary}{f' ({parameters})' if parameters else ''}")
        self.epilog = "\n".join(lines)
        super().format_help(ctx, formatter)


def finetune(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for result.json.")],
    task: Annotated[
        str | None,
        typer.Option(
            help="cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte or wnli; or OWNER/NAME[:CONFIG], a data set of the hub; "
            "or, with --data FILE, a name for it."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="GLUE folder, or a data set like the hub's nyu-mll/glue; or a file of your own to train on: .csv, "
            ".tsv, .jsonl or .parquet, or a pattern such as 'part-*.csv'."
        ),
    ] = None,
    eval_data: EvalData = None,
    columns: ColumnNames = None,
    split: Annotated[
        str,
        typer.Option(
            metavar="glue|paper|holdout:SHARE",
            help="glue: evaluate on GLUE's dev split, --eval-data or the hub's validation split. paper: that and the "
            "training data pooled, then dealt 80:20 by the seed. holdout:0.2: on that share of the training data.",
        ),
    ] = "glue",
    metrics: Metrics = "",
    hub_splits: HubSplits = "",
    arm: Annotated[
        str, typer.Option(help="One of the arms below, with parameters if need be: mixout:p=0.9.")
    ] = "guided",
    arm_param: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A parameter of the arm; may be given several times.")
    ] = None,
    schedule: Annotated[
        Path | None, typer.Option(help="Schedule file, for guided arms and controls; refused by others.")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Profile folder, for arms that go by Fisher; refused by others.")
    ] = None,
    seed: Seed = 0,
    train_fraction: Annotated[float, typer.Option(help="Share of the training data to use.")] = Recipe.train_fraction,
    epochs: Annotated[int, typer.Option(help="Passes over the training data.")] = Recipe.epochs,
    batch_size: Annotated[int, typer.Option(help="Examples per step.")] = Recipe.batch_size,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = Recipe.learning_rate,
    max_length: Annotated[
        int | None,
        typer.Option(
            help="Tokens at which an example is cut, or the model's limit where that is less.",
            show_default=str(Recipe.max_length),
        ),
    ] = None,
    rate: Annotated[float, typer.Option(help="Rate of plain dropout, in arms that do not set it themselves.")] = (
        Recipe.rate
    ),
    weight_decay: Annotated[float, typer.Option(help="AdamW's weight decay.")] = Recipe.weight_decay,
    warmup_ratio: Annotated[float, typer.Option(help="Share of the steps until the peak.")] = Recipe.warmup_ratio,
    evaluate: Annotated[str, typer.Option(help="After each epoch, or at the end alone: epoch or end.")] = (
        Recipe.evaluate
    ),
    precision: Annotated[str, typer.Option(help="float32, bfloat16, or auto: bfloat16 on a GPU that has it.")] = (
        Recipe.precision
    ),
    device: Annotated[str, typer.Option(help="auto or cpu.")] = Recipe.device,
    residual_sites: ResidualSites = False,
) -> None:
    """Fine-tune on one task under one arm; runs with the same seed differ in the arm only."""
    from guided_dropout.arms import ARMS, choose_arm
    from guided_dropout.errors import DataError
    from guided_dropout.finetune import finetune as run
    from guided_dropout.fisher import FisherProfile
    from guided_dropout.results import JSON_NAME
    from guided_dropout.schedule import DropoutSchedule

    name = choose_arm(arm, arm_param or ()).name
    for what, file in {"schedule": schedule, "profile": profile}.items():
        if file and what not in ARMS[name].uses:
            able = ", ".join(other for other in ARMS if what in ARMS[other].uses)
            raise DataError(
                f"--{what} {file} with the arm {name!r}, which uses no {what}; expected one that does ({able}), or no "
                f"--{what}"
            )

    def told(note: str) -> None:
        console.print(note, style="dim", highlight=False)

    planned = DropoutSchedule.load(schedule) if schedule else None
    measured = FisherProfile.from_pretrained(profile) if profile else None
    with progress_bar(f"{task or data} {arm}", None) as update:
        result = run(
            model,
            task,
            data=data,
            eval_data=eval_data,
            columns=columns,
            metrics=metrics,
            hub_splits=hub_splits,
            split=split,
            arm=arm,
            arm_parameters=arm_param or (),
            schedule=planned,
            profile=measured,
            seed=seed,
            train_fraction=train_fraction,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            max_length=max_length,
            rate=rate,
            weight_decay=weight_decay,
            warmup_ratio=warmup_ratio,
            evaluate=evaluate,
            precision=precision,
            device=device,
            residual_sites=residual_sites,
            out=out,
            told=told,
            progress=update,
        )
    value = "diverged" if result.value is None else f"{result.value:.4f}"
    further = {name: v for name, v in result.metrics.items() if name.startswith(f"{result.metric}_") and v is not None}
    value += "".join(f", {name} {v:.4f}" for name, v in further.items())
    console.print(f"{result.task} {result.arm} seed {seed}: {result.metric} {value} ({result.times['total']:.0f} s)")
    console.print(out / JSON_NAME)
