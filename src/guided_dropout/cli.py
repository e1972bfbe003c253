"""The command line: arguments in, one call, paths out."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from guided_dropout.console import console, errors, progress_bar, site_table
from guided_dropout.errors import GuidedDropoutError

app = typer.Typer(
    name="guided-dropout",
    help="Dropout rates for fine-tuning language models, guided by the Fisher information of the pretrained weights.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

MODEL_HELP = "a local folder, a name on the hub, or 'demo' (embedded)"
Model = Annotated[str, typer.Argument(metavar="MODEL", help=f"The model: {MODEL_HELP}.")]
Seed = Annotated[int, typer.Option(help="Random seed.")]


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
    text: Annotated[
        str, typer.Option(help="Text to measure on: a UTF-8 file (.gz and .xz too), or 'demo' (embedded).")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the profile.")],
    objective: Annotated[str, typer.Option(help="auto, mlm (masked LM) or causal (next token).")] = "auto",
    samples: Annotated[int, typer.Option(help="How many samples.")] = 1000,
    max_length: Annotated[int, typer.Option(help="Tokens per sample.")] = 128,
    batch_size: Annotated[int, typer.Option(help="Samples per forward pass; changes speed and memory only.")] = 8,
    reduction: Annotated[str, typer.Option(help="A sample's loss: mean or sum over its targets.")] = "mean",
    parameters: Annotated[
        str, typer.Option(help="Which to measure: all, trainable, or base (none that an adapter has brought).")
    ] = "all",
    seed: Seed = 0,
) -> None:
    """Measure a model's diagonal Fisher information on a text; do it once per model."""
    from guided_dropout import corpus
    from guided_dropout.artefacts import check_output_folder
    from guided_dropout.fisher import estimate_fisher, profile
    from guided_dropout.models import check_length, load_lm, load_tokenizer
    from guided_dropout.objectives import detect_objective

    check_output_folder(out, marker=profile.JSON_NAME)
    lines = _read_text(text)
    lm, tokenizer = load_lm(model, objective), load_tokenizer(model)
    check_length(lm, max_length)
    kind = detect_objective(lm, {"input_ids": list(range(1, 9))}).name
    drawn = corpus.lm_samples(
        lines, tokenizer, objective=kind, num_samples=samples, max_length=max_length, seed=seed
    )  # fmt: skip
    if len(drawn) < samples:
        console.print(
            f"{text} has {len(drawn):,} samples of {max_length} tokens, fewer than {samples:,}: using them all"
        )
    with progress_bar("samples", len(drawn)) as update:
        measured = estimate_fisher(
            lm,
            drawn,
            batch_size=batch_size,
            objective=objective,
            reduction=reduction,
            parameters=parameters,
            progress=lambda done: update(done, None),
            facts={"source": model, "text": text, "seed": seed, "max_length": max_length},
        )
    folder = measured.save_pretrained(out)
    fallback = measured.coverage["fallback"]
    console.print(
        f"{measured.num_samples:,} samples ({kind}), {measured.num_skipped} without a target skipped; "
        f"{measured.coverage['parameters_by_rule']:.1%} of the parameters by rule"
        + (f", one sample at a time: {', '.join(fallback)}" if fallback else "")
    )
    console.print(folder)


@app.command()
def inspect(
    model: Model,
    profile: Annotated[Path | None, typer.Option(help="Profile folder: adds each site's score.")] = None,
    schedule: Annotated[Path | None, typer.Option(help="Schedule file: adds each site's rate in it.")] = None,
    grouping: Annotated[str, typer.Option(help="Which parameters feed a site: owner or dataflow.")] = "owner",
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


@app.command()
def schedule(
    profile: Annotated[Path, typer.Argument(metavar="DIR", help="Profile folder that `fisher` wrote.")],
    out: Annotated[Path, typer.Option(help="Schedule file (JSON).")],
    upper: Annotated[float, typer.Option(help="Rate of the least informative site.")] = 0.1,
    lower: Annotated[float, typer.Option(help="Rate of the most informative site.")] = 0.0,
    shape: Annotated[str, typer.Option(help="How the rate falls with the rank.")] = "linear",
    grouping: Annotated[str, typer.Option(help="Which parameters feed a site: owner or dataflow.")] = "owner",
    model: Annotated[
        str | None, typer.Option(help="Take the sites from this model, not from the profile's own.")
    ] = None,
) -> None:
    """Turn a profile into a dropout rate for each site."""
    from guided_dropout.errors import ScheduleError
    from guided_dropout.fisher import FisherProfile
    from guided_dropout.models import load_lm
    from guided_dropout.regularizers import dropout_table
    from guided_dropout.schedule import DropoutSchedule

    measured = FisherProfile.from_pretrained(profile)
    source = model or measured.provenance.get("source") or measured.model.get("name_or_path")
    if not source:
        raise ScheduleError(f"{profile} does not say which model it was measured on; name it with --model")
    lm = load_lm(source)
    planned = DropoutSchedule.from_profile(measured, lm, upper=upper, lower=lower, shape=shape, grouping=grouping)
    path = planned.save(out)
    console.print(site_table(dropout_table(lm, planned, measured, grouping)))
    console.print(f"{len(planned.rates)} sites, mean rate {planned.mean_rate:.4f}")
    console.print(path)


@app.command()
def finetune(
    model: Model,
    task: Annotated[str, typer.Option(help="cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte or wnli.")],
    out: Annotated[Path, typer.Option(help="Folder for result.json.")],
    data: Annotated[str | None, typer.Option(help="GLUE folder, or a data set like the hub's nyu-mll/glue.")] = None,
    arm: Annotated[str, typer.Option(help="guided, dropout, uniform (at the schedule's mean) or none.")] = "guided",
    schedule: Annotated[Path | None, typer.Option(help="Schedule file, for guided and uniform.")] = None,
    seed: Seed = 0,
    train_fraction: Annotated[float, typer.Option(help="Share of the training data to use.")] = 1.0,
    epochs: Annotated[int, typer.Option(help="Passes over the training data.")] = 3,
    batch_size: Annotated[int, typer.Option(help="Examples per step.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-5,
    max_length: Annotated[int, typer.Option(help="Tokens at which an example is cut.")] = 128,
    rate: Annotated[float, typer.Option(help="Rate of the arm 'dropout'.")] = 0.1,
) -> None:
    """Fine-tune on one task under one arm; runs with the same seed differ in the arm only."""
    from guided_dropout.finetune import finetune as run
    from guided_dropout.schedule import DropoutSchedule

    planned = DropoutSchedule.load(schedule) if schedule else None
    with progress_bar(f"{task} {arm}", None) as update:
        result = run(
            model,
            task,
            data=data,
            arm=arm,
            schedule=planned,
            seed=seed,
            train_fraction=train_fraction,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            max_length=max_length,
            rate=rate,
            out=out,
            progress=update,
        )
    value = "diverged" if result.value is None else f"{result.value:.4f}"
    console.print(f"{result.task} {result.arm} seed {seed}: {result.metric} {value} ({result.times['total']:.0f} s)")
    console.print(out / "result.json")


def _read_text(text: str) -> Sequence[str]:
    from guided_dropout import corpus

    if text != "demo":
        return corpus.read_text(text)
    from guided_dropout.demo.text import demo_paragraphs

    return demo_paragraphs()


def main() -> None:
    """Run the command line; a mistake of the user's is one line on stderr and exit code 2."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        app(standalone_mode=True)
    except GuidedDropoutError as e:
        errors.print(f"error: {' '.join(str(e).split())}", markup=False, highlight=False)
        sys.exit(2)
    except _Interrupted:
        errors.print("error: interrupted; nothing was written by the unfinished step: run the command again")
        sys.exit(2)


class _Interrupted(BaseException):
    """Not a KeyboardInterrupt, of which Typer would make its own message and exit code."""


def _interrupt(*_: Any) -> None:
    raise _Interrupted
