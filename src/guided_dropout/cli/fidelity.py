"""The command line's `fidelity`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from guided_dropout.cli import options
from guided_dropout.cli.console import console, kept_whole, progress_bar
from guided_dropout.cli.inputs import Given
from guided_dropout.cli.interrupts import interrupts_wait, resumable
from guided_dropout.errors import DataError

if TYPE_CHECKING:
    from guided_dropout.fidelity import Fidelity
    from guided_dropout.fidelity.table import Table as Rows


def fidelity(
    model: options.Model,
    text: options.Text,
    out: Annotated[Path, typer.Option(help="File for the result (JSON); `plot fidelity` draws it.")],
    samples: Annotated[str, typer.Option(help="How many samples to draw, or 'all': what 100 % is.")] = "1000",
    fractions: Annotated[
        str, typer.Option(help="Sizes of the sub-samples, as shares of the samples.")
    ] = "0.33,0.1,0.05,0.01,0.001",
    top: Annotated[
        str, typer.Option(help="Shares of the parameters, those with the largest values, to compare.")
    ] = "0.05,0.01,0.005,0.0025",
    draws: Annotated[int, typer.Option(help="Sub-samples of each size.")] = 5,
    tau: Annotated[float, typer.Option(help="Kendall's tau that a schedule should reach.")] = 0.95,
    grouping: options.Grouping = "owner",
    scores_only: Annotated[
        bool, typer.Option("--scores-only", help="Compare schedules alone: next to no memory, less arithmetic.")
    ] = False,
    profile_out: Annotated[
        Path | None, typer.Option(help="Folder for the profile of all samples, which comes with it.")
    ] = None,
    max_memory: Annotated[
        float | None, typer.Option(help="Gigabytes that the sums may take; by default what is available.")
    ] = None,
    objective: options.Objective = "auto",
    max_characters: options.MaxCharacters = None,
    max_length: options.MaxLength = 128,
    batch_size: options.BatchSize = 8,
    tokens_per_batch: options.TokensPerBatch = None,
    resume: options.Resume = None,
    checkpoint_every: options.CheckpointEvery = 300.0,
    device: options.Device = None,
    dtype: options.Dtype = "float32",
    seed: options.Seed = 0,
) -> None:
    """How little text is enough: the Fisher of sub-samples, and their schedules, beside all samples; in one pass."""
    from guided_dropout.artefacts import beside, check_output_file, check_output_folder
    from guided_dropout.devices import check_placement, to_device
    from guided_dropout.fidelity import Fidelity
    from guided_dropout.fidelity import fidelity as run
    from guided_dropout.fidelity.memory import in_gigabytes
    from guided_dropout.fidelity.result import KIND
    from guided_dropout.fisher import profile
    from guided_dropout.fisher.checkpoint import check_unused, holds_state, remove_checkpoint

    shares, tops = _numbers("--fractions", fractions), _numbers("--top", top)
    if out.is_dir():
        raise DataError(f"{out} is a folder; expected a file for the result, as {out / 'fidelity.json'}")
    state = beside(out, ".checkpoint")
    if max_memory is not None and not 0 < max_memory < math.inf:
        raise DataError(f"--max-memory {max_memory:g}; expected gigabytes, a number above 0")
    if profile_out:
        _check_apart(profile_out, out)
        check_output_folder(profile_out, marker=profile.JSON_NAME)
    check_output_file(out, kind=KIND)
    if resume is None:
        check_unused(state)
    check_placement(device, None, 1)
    there = resume and not holds_state(state) and out.exists() and (not profile_out or _has_profile(profile_out))
    finished = Fidelity.load(out) if there else None
    given = Given(
        model=model, text=text, samples=samples, objective=objective, max_characters=max_characters,
        max_length=max_length, dtype=dtype, seed=seed,
    )  # fmt: skip
    loaded, inputs = given.load()
    loaded = to_device(loaded, device)

    def planned(count: int, needed: int) -> None:
        what = "no sums of the parameters' size" if scores_only else f"{in_gigabytes(needed)} of memory for the sums"
        console.print(f"{count:,} samples in one pass, {draws} draws of {len(shares)} sizes; {what}", highlight=False)

    with (
        interrupts_wait() as stop_if_asked,
        resumable(state, holds_state),
        progress_bar("samples", inputs.total) as update,
    ):

        def progress(done: int) -> None:
            update(done)
            stop_if_asked()

        result = run(
            loaded,
            inputs.samples,
            fractions=shares,
            tops=tops,
            draws=draws,
            tau=tau,
            grouping=grouping,
            scores_only=scores_only,
            seed=seed,
            batch_size=batch_size,
            tokens_per_batch=tokens_per_batch,
            objective=objective,
            max_memory=None if max_memory is None else int(max_memory * 1e9),
            checkpoint=state,
            checkpoint_every=checkpoint_every,
            resume=resume,
            finished=finished,
            planned=planned,
            progress=progress,
            facts=inputs.facts,
        )
        if result is not finished:  # in here a signal waits: it does not lose a finished pass
            result.save(out)
            if profile_out and result.profile:
                result.profile.save_pretrained(profile_out)
            remove_checkpoint(state)
    if result is finished:
        if profile_out:
            _check_profile(profile_out, result)
        console.print("the comparison of this run is there already: nothing was measured")
    _print(result)
    if profile_out:
        console.print(profile_out)
    console.print(out)


def _check_apart(profile_out: Path, out: Path) -> None:
    """Refuse a profile's folder that is the result's file, lies below it or has it inside: the second would be lost."""
    folder, file = profile_out.resolve(), out.resolve()
    if folder.is_relative_to(file) or file.is_relative_to(folder):
        raise DataError(
            f"--profile-out {profile_out} with --out {out}; expected a folder of the profile's own, beside the result: "
            f"--profile-out {out.parent / 'profile'}"
        )


def _has_profile(folder: Path) -> bool:
    from guided_dropout.fisher.profile import JSON_NAME

    return (folder / JSON_NAME).exists()


def _check_profile(folder: Path, result: Fidelity) -> None:
    """Refuse the profile of another run than the comparison that it would come with."""
    from guided_dropout.fisher import FisherProfile
    from guided_dropout.unfinished import check_finished

    found = FisherProfile.from_pretrained(folder)
    there = {"num_samples": found.num_samples, "model": found.model, **found.provenance}
    provenance = {key: value for key, value in result.provenance.items() if key != "run"}
    here = {"num_samples": result.num_samples, "model": result.model, **provenance}
    check_finished(f"{folder} holds the profile", there, here)


def _print(result: Fidelity) -> None:
    from guided_dropout.fidelity.table import PAPER, PAPER_NOTE, SHORT, parameters_table, schedule_table, summary

    if result.orders:
        console.print(_rich(schedule_table(result)))
        console.print()
    if result.cells:
        heads, rows = parameters_table(result, SHORT)
        console.print(_rich((heads, rows)))
        if PAPER in heads:
            console.print(PAPER_NOTE, style="dim", highlight=False)
        console.print()
    for sentence in summary(result):
        console.print(sentence, highlight=False)


def _rich(rows: Rows) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for head in rows[0]:
        table.add_column(head, justify="right")
    for row in rows[1]:
        table.add_row(*row)
    return kept_whole(table)


def _numbers(option: str, given: str) -> list[float]:
    try:
        return [float(part) for part in given.split(",")]
    except ValueError:
        raise DataError(f"{option} {given}; expected numbers with commas between them, as 0.1,0.01") from None
