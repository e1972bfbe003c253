"""The command line: arguments in, one call, paths out."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from guided_dropout.cli_bench import bench_app
from guided_dropout.cli_fidelity import fidelity
from guided_dropout.cli_inputs import Given
from guided_dropout.cli_landscape import landscape_app
from guided_dropout.cli_options import (
    PROFILE_HELP,
    BatchSize,
    CheckpointEvery,
    ColumnNames,
    Device,
    Dtype,
    Grouping,
    MaxCharacters,
    MaxLength,
    Model,
    Objective,
    ResidualSites,
    Resume,
    Seed,
    Task,
    TaskData,
    TextOrTask,
    TokensPerBatch,
)
from guided_dropout.cli_plot import plot_app
from guided_dropout.cli_schedule import schedule_app
from guided_dropout.cli_shared import choose
from guided_dropout.console import arms_help, console, errors, progress_bar, site_table, weights_note
from guided_dropout.errors import DataError, GuidedDropoutError
from guided_dropout.interrupts import SIGNALS, Interrupted, interrupt, interrupts_wait, resumable

if TYPE_CHECKING:
    from guided_dropout.fisher import FisherProfile

app = typer.Typer(
    name="guided-dropout",
    help="Dropout rates for fine-tuning language models, guided by the Fisher information of the pretrained weights.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(schedule_app, name="schedule")
app.add_typer(bench_app, name="bench")
app.add_typer(landscape_app, name="landscape")
app.add_typer(plot_app, name="plot")


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for the report and everything it was made from.")],
    seeds: Annotated[int, typer.Option(help="Paired restarts of each arm.")] = 5,
) -> None:
    """Show the whole thing on an embedded model and text: Fisher, schedule, paired fine-tuning, report."""
    from guided_dropout.demo.quickstart import quickstart as run

    for path in run(out, seeds=seeds):
        console.print(path)


@app.command()
def fisher(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the profile.")],
    text: TextOrTask = None,
    task: Task = None,
    data: TaskData = None,
    columns: ColumnNames = None,
    objective: Objective = "auto",
    labels: Annotated[
        str,
        typer.Option("--fisher", help="empirical (the data's labels) or sampled (drawn from the model's prediction)."),
    ] = "empirical",
    samples: Annotated[str, typer.Option(help="How many samples to draw, or 'all', in their order.")] = "1000",
    max_characters: MaxCharacters = None,
    max_length: MaxLength = 128,
    batch_size: BatchSize = 8,
    tokens_per_batch: TokensPerBatch = None,
    reduction: Annotated[str, typer.Option(help="A sample's loss: mean or sum over its targets.")] = "mean",
    skip_nonfinite: Annotated[
        bool, typer.Option("--skip-nonfinite", help="Leave out and count samples whose loss is NaN or infinite.")
    ] = False,
    resume: Resume = None,
    checkpoint_every: CheckpointEvery = 300.0,
    device: Device = None,
    device_map: Annotated[
        str | None, typer.Option(help="Spread a model over several devices, for instance auto.")
    ] = None,
    parameters: Annotated[
        str, typer.Option(help="Which to measure: all, trainable, or base (none that an adapter has brought).")
    ] = "all",
    save_dtype: Annotated[str, typer.Option(help="Of the values on disk: float32, or bfloat16 for half.")] = "float32",
    scores_only: Annotated[
        bool, typer.Option("--scores-only", help="Keep each tensor's mean alone: all a schedule needs, flat in memory.")
    ] = False,
    until_ranked: Annotated[
        bool, typer.Option("--until-ranked", help="Stop as soon as the order of the sites is settled.")
    ] = False,
    until_stable: Annotated[
        bool,
        typer.Option(
            "--until-stable", help="Stop as soon as the order as a whole is settled; a few ties may stay open."
        ),
    ] = False,
    stable_tau: Annotated[
        float, typer.Option(help="Of --until-stable: Kendall's tau with the order that other samples would give.")
    ] = 0.95,
    rank_confidence: Annotated[float, typer.Option(help="Of --until-ranked and --until-stable.")] = 0.95,
    rank_tolerance: Annotated[
        float, typer.Option(help="Of --until-ranked: scores that differ by less may change places.")
    ] = 0.05,
    dtype: Dtype = "float32",
    seed: Seed = 0,
) -> None:
    """Measure a model's diagonal Fisher information on a text; do it once per model."""
    from guided_dropout.artefacts import check_output_folder
    from guided_dropout.devices import check_placement, to_device
    from guided_dropout.fisher import estimate_fisher, profile
    from guided_dropout.fisher.checkpoint import check_unused, holds_state, remove_checkpoint
    from guided_dropout.fisher.processes import current_processes, leave_processes
    from guided_dropout.fisher.ranking import RankingTest
    from guided_dropout.fisher.stability import StabilityTest
    from guided_dropout.sites import find_sites

    state = out.with_name(f"{out.name}.checkpoint")
    world = current_processes()
    with world.together():
        check_placement(device, device_map, world.count)
        if world.is_main:
            check_output_folder(out, marker=profile.JSON_NAME)
        profile.check_dtype(save_dtype)
        if resume is None:
            check_unused(state)
        source_of_labels = choose("--fisher", labels, {"empirical": "data", "sampled": "model"})
        given = Given(
            model=model, text=text, task=task, data=data, columns=columns, samples=samples, objective=objective,
            max_characters=max_characters, max_length=max_length, dtype=dtype, device_map=device_map, seed=seed,
        )  # fmt: skip
        if until_ranked and until_stable:
            raise DataError("both --until-ranked and --until-stable; expected one rule to stop by: leave one out")
        if (until_ranked or until_stable) and given.number is None:
            rule = "--until-ranked" if until_ranked else "--until-stable"
            raise DataError(f"{rule} with --samples all; expected samples drawn at random: give their number")
        loaded, inputs = given.load(shown=world.is_main)
        ranking = None
        if until_ranked or until_stable:
            sites = {s.path: s.parameters for s in find_sites(loaded) if not s.in_head}
            ranking = (
                RankingTest(sites, alpha=1 - rank_confidence, tolerance=rank_tolerance)
                if until_ranked
                else StabilityTest(sites, tau=stable_tau, confidence=rank_confidence, seed=seed)
            )
        if device_map is None:
            loaded = to_device(loaded, device or world.device)
    share = "samples" if world.count == 1 else f"samples of process 1 of {world.count}"
    counted = _Counted(inputs.samples)
    with (
        interrupts_wait() as stop_if_asked,
        resumable(state, holds_state, told=world.is_main),
        progress_bar(share, inputs.total and -(-inputs.total // world.count), shown=world.is_main) as update,
    ):

        def progress(done: int) -> None:
            update(done, tokens=counted.tokens_each)
            stop_if_asked()

        measured = estimate_fisher(
            loaded,
            counted,
            batch_size=batch_size,
            tokens_per_batch=tokens_per_batch,
            objective=objective,
            reduction=reduction,
            labels=source_of_labels,
            parameters=parameters,
            seed=seed,
            scores_only=scores_only,
            until_ranked=ranking,
            nonfinite="skip" if skip_nonfinite else "error",
            checkpoint=state,
            checkpoint_every=checkpoint_every,
            resume=resume,
            distributed=world.count > 1,
            progress=progress,
            facts=inputs.facts,
        )
    with world.together():
        if world.is_main:
            folder = measured.save_pretrained(out, dtype=save_dtype)
            remove_checkpoint(state)
            _print_fisher(measured, folder)
    leave_processes()


def _print_fisher(measured: FisherProfile, folder: Path) -> None:
    coverage = measured.coverage
    left_out = coverage.get("nonfinite", [])
    some = ", ".join(map(str, left_out[:10])) + (", …" if len(left_out) > 10 else "")
    console.print(
        f"{measured.num_samples:,} samples ({measured.objective}), {measured.num_skipped} without a target skipped"
        + (f", {len(left_out)} not finite left out (number {some} of the stream, from 0)" if left_out else "")
        + f"; {coverage['parameters_by_rule']:.1%} of the parameters by rule"
        + (f", one sample at a time: {', '.join(coverage['fallback'])}" if coverage["fallback"] else "")
    )
    if ranking := measured.provenance.get("ranking"):
        console.print(_settled(ranking))
    console.print(folder)


def _settled(found: Mapping[str, Any]) -> str:
    """What a rule to stop by has found, in a line."""
    state, after = "" if found["settled"] else "not ", f"after {found['samples']:,} samples"
    if found["rule"] == "stable":
        lower = "–" if found["tau_lower"] is None else f"{found['tau_lower']:.3f}"
        return (
            f"order of the sites {state}stable {after}: {found['confidence']:.0%} of the bootstrap replicates have a "
            f"Kendall's tau of {lower} or more with it ({found['tau']:g} was asked for)"
        )
    doubtful = ", ".join(" < ".join(pair) for pair in found["undecided"])
    return (
        f"order of the sites {state}settled {after} (confidence {found['confidence']:.0%}, tolerance "
        f"{found['tolerance']:.0%})" + (f"; undecided: {doubtful}" if doubtful else "")
    )


class _Counted:
    """Samples, counted with their tokens as they are read."""

    def __init__(self, samples: Iterable[Mapping[str, Any]]):
        self._samples, self._read, self._tokens = samples, 0, 0

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for sample in self._samples:
            self._read += 1
            self._tokens += len(sample["input_ids"])
            yield sample

    @property
    def tokens_each(self) -> float:
        return self._tokens / max(1, self._read)


@app.command()
def merge(
    profiles: Annotated[list[str], typer.Argument(metavar="PROFILE...", help=f"Two or more: {PROFILE_HELP}.")],
    out: Annotated[Path, typer.Option(help="Folder for the merged profile.")],
) -> None:
    """Make one profile of several that were measured on different samples, each weighted by how many it saw."""
    from guided_dropout.artefacts import check_output_folder
    from guided_dropout.fisher import FisherProfile, profile
    from guided_dropout.fisher import merge as run

    check_output_folder(out, marker=profile.JSON_NAME)
    merged = run(*map(FisherProfile.from_pretrained, profiles))
    folder = merged.save_pretrained(out)
    console.print(f"{merged.num_samples:,} samples" + ("" if merged.diagonal else ", tensor means only"))
    console.print(folder)


@app.command()
def inspect(
    model: Model,
    profile: Annotated[str | None, typer.Option(help=f"Adds each site's score: {PROFILE_HELP}.")] = None,
    schedule: Annotated[Path | None, typer.Option(help="Schedule file: adds each site's rate in it.")] = None,
    grouping: Grouping = "owner",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with the parameters' names.")] = False,
) -> None:
    """List a model's dropout sites, found by running it: path, kind, the rate that arrives, what feeds it, score."""
    from guided_dropout.fisher import FisherProfile
    from guided_dropout.models import load_model
    from guided_dropout.regularizers import dropout_table
    from guided_dropout.schedule import DropoutSchedule
    from guided_dropout.sites import trace

    loaded = load_model(model)
    measured = FisherProfile.from_pretrained(profile) if profile else None
    planned = DropoutSchedule.load(schedule) if schedule else None
    rows = dropout_table(loaded, planned, measured, grouping)
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
        return
    console.print(site_table(rows))
    dead = trace(loaded).dead
    if dead:
        console.print(f"set but never used in training: {', '.join(dead)}", style="dim")
    if measured and measured.noise:
        console.print(f"rounding noise alone, left out of the scores: {', '.join(measured.noise)}", style="dim")
    if planned and (note := weights_note(planned, loaded)):
        console.print(note, style="dim", highlight=False)


app.command()(fidelity)


@app.command(epilog=arms_help())
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
    eval_data: Annotated[
        str | None, typer.Option(metavar="FILE", help="Beside a --data file: one to evaluate on.")
    ] = None,
    columns: ColumnNames = None,
    split: Annotated[
        str,
        typer.Option(
            metavar="glue|paper|holdout:SHARE",
            help="glue: evaluate on GLUE's dev split, --eval-data or the hub's validation split. paper: that and the "
            "training data pooled, then dealt 80:20 by the seed. holdout:0.2: on that share of the training data.",
        ),
    ] = "glue",
    metrics: Annotated[
        str,
        typer.Option(
            metavar="NAME[,NAME]",
            help="accuracy, f1, matthews_correlation; pearson, spearman. The first stands for the run. Without it, the "
            "task's: accuracy for classes, pearson for a regression.",
        ),
    ] = "",
    hub_splits: Annotated[
        str,
        typer.Option(
            metavar="TRAIN,EVALUATION",
            help="Splits of a hub data set; more to evaluate may follow. Without it, train and validation, or test.",
        ),
    ] = "",
    arm: Annotated[
        str, typer.Option(help="One of the arms below, with parameters if need be: mixout:p=0.9.")
    ] = "guided",
    arm_param: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A parameter of the arm; may be given several times.")
    ] = None,
    schedule: Annotated[Path | None, typer.Option(help="Schedule file, for guided arms and controls.")] = None,
    profile: Annotated[Path | None, typer.Option(help="Profile folder, for arms that go by Fisher.")] = None,
    seed: Seed = 0,
    train_fraction: Annotated[float, typer.Option(help="Share of the training data to use.")] = 1.0,
    epochs: Annotated[int, typer.Option(help="Passes over the training data.")] = 3,
    batch_size: Annotated[int, typer.Option(help="Examples per step.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-5,
    max_length: Annotated[int, typer.Option(help="Tokens at which an example is cut.")] = 128,
    rate: Annotated[float, typer.Option(help="Rate of plain dropout, in arms that do not set it themselves.")] = 0.1,
    weight_decay: Annotated[float, typer.Option(help="AdamW's weight decay.")] = 0.0,
    evaluate: Annotated[str, typer.Option(help="After each epoch, or at the end alone: epoch or end.")] = "epoch",
    precision: Annotated[str, typer.Option(help="float32, bfloat16, or auto: bfloat16 on a GPU that has it.")] = "auto",
    residual_sites: ResidualSites = False,
) -> None:
    """Fine-tune on one task under one arm; runs with the same seed differ in the arm only."""
    from guided_dropout.finetune import finetune as run
    from guided_dropout.fisher import FisherProfile
    from guided_dropout.results import JSON_NAME
    from guided_dropout.schedule import DropoutSchedule

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
            evaluate=evaluate,
            precision=precision,
            residual_sites=residual_sites,
            out=out,
            told=console.print,
            progress=update,
        )
    value = "diverged" if result.value is None else f"{result.value:.4f}"
    further = {name: v for name, v in result.metrics.items() if name.startswith(f"{result.metric}_") and v is not None}
    value += "".join(f", {name} {v:.4f}" for name, v in further.items())
    console.print(f"{result.task} {result.arm} seed {seed}: {result.metric} {value} ({result.times['total']:.0f} s)")
    console.print(out / JSON_NAME)


def main() -> None:
    """Run the command line; a mistake of the user's is one line on stderr and exit code 2."""
    for number in SIGNALS:
        signal.signal(number, interrupt)
    try:
        app(standalone_mode=True)
    except GuidedDropoutError as e:
        if not e.told_elsewhere:
            errors.print(f"error: {' '.join(str(e).split())}", markup=False, highlight=False)
        sys.exit(2)
    except Interrupted as e:
        what = str(e) or "nothing was written by the unfinished step: run the command again"
        errors.print(f"error: interrupted; {what}", markup=False, highlight=False)
        sys.exit(2)
