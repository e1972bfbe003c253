"""The command line: its commands, and what becomes of a user's mistake."""

from __future__ import annotations

import json
import os
import signal
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from guided_dropout.cli.bench import bench_app
from guided_dropout.cli.console import console, errors, site_table
from guided_dropout.cli.fidelity import fidelity
from guided_dropout.cli.finetune import ArmsInHelp, finetune
from guided_dropout.cli.fisher import fisher, merge
from guided_dropout.cli.interrupts import SIGNALS, Interrupted, interrupt
from guided_dropout.cli.landscape import landscape_app
from guided_dropout.cli.options import PROFILE_HELP, Grouping, Model, ResidualSites
from guided_dropout.cli.plot import plot_app
from guided_dropout.cli.schedule import schedule_app
from guided_dropout.errors import GuidedDropoutError

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


def _version(asked: bool) -> None:
    if asked:
        console.print(f"guided-dropout {metadata.version('guided-dropout')}", highlight=False)
        raise typer.Exit


@app.callback()
def _(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for the report and everything it was made from.")],
    seeds: Annotated[int, typer.Option(help="Paired restarts of each arm.")] = 5,
) -> None:
    """Show the whole thing on an embedded model and text: Fisher, schedule, paired fine-tuning, report."""
    from guided_dropout.cli.quickstart import quickstart as run

    for path in run(out, seeds=seeds):
        console.print(path)


app.command()(fisher)
app.command()(merge)


@app.command()
def inspect(
    model: Model,
    profile: Annotated[str | None, typer.Option(help=f"Adds each site's score: {PROFILE_HELP}.")] = None,
    schedule: Annotated[Path | None, typer.Option(help="Schedule file: adds each site's rate in it.")] = None,
    grouping: Grouping = "owner",
    residual_sites: ResidualSites = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with the parameters' names.")] = False,
) -> None:
    """List a model's dropout sites, found by running it: path, kind, the rate that arrives, what feeds it, score."""
    from guided_dropout.fisher import FisherProfile
    from guided_dropout.models import load_model
    from guided_dropout.regularizers import dropout_table
    from guided_dropout.regularizers.residual import added_sites
    from guided_dropout.schedule import DropoutSchedule
    from guided_dropout.sites import trace

    loaded = load_model(model)
    measured = FisherProfile.from_pretrained(profile) if profile else None
    planned = DropoutSchedule.load(schedule) if schedule else None
    with added_sites(loaded, residual_sites):
        rows = dropout_table(loaded, planned, measured, grouping)
        dead = trace(loaded).dead
    if as_json:
        print(json.dumps(rows, indent=1), flush=True)
        return
    console.print(site_table(rows))
    if dead:
        console.print(f"set but never used in training: {', '.join(dead)}", style="dim")
    if measured and measured.noise:
        console.print(f"rounding noise alone, left out of the scores: {', '.join(measured.noise)}", style="dim")
    if measured and (note := measured.weights_note(loaded)):
        console.print(note, style="dim", highlight=False)
    if planned and (note := planned.weights_note(loaded)):
        console.print(note, style="dim", highlight=False)


app.command()(fidelity)
app.command(cls=ArmsInHelp)(finetune)


def main() -> None:
    """Run the command line; a mistake of the user's is one line on stderr and exit code 2."""
    for number in SIGNALS:
        signal.signal(number, interrupt)
    if sys.stdout is None:  # closed, as by `>&-`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        app(standalone_mode=True)
    except GuidedDropoutError as e:
        if not e.told_elsewhere:
            errors.print(f"error: {' '.join(str(e).split())}", highlight=False)
        sys.exit(2)
    except RuntimeError as e:
        if "torch" not in sys.modules or not isinstance(e, sys.modules["torch"].OutOfMemoryError):
            raise
        found = " ".join(str(e).split())[:100]
        errors.print(
            f"error: the device's memory does not suffice ({found}); expected room for a batch: give a smaller batch, "
            "shorter samples, or another --device",
            highlight=False,
        )
        sys.exit(2)
    except OSError:
        if (why := _why_not_printed()) is None:
            raise
        errors.print(
            f"error: standard output cannot be written ({why}); expected a terminal, file or pipe that takes what is "
            "printed: what was to be written to files before is there",
            highlight=False,
        )
        sys.exit(2)
    except Interrupted as e:
        what = str(e) or "nothing was written by the unfinished step: run the command again"
        errors.print(f"error: interrupted; {what}", highlight=False)
        sys.exit(2)


def _why_not_printed() -> str | None:
    """Why standard output cannot be written, and have nobody try again; None if it can."""
    try:
        print(flush=True)  # buffered or not, it shows
    except OSError as e:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return e.strerror or str(e)
    return None
