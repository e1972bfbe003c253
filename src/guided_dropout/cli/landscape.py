"""The command line's `landscape`: make, show."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from guided_dropout.cli import options
from guided_dropout.cli.console import console, progress_bar
from guided_dropout.cli.inputs import Given
from guided_dropout.cli.interrupts import interrupts_wait, resumable
from guided_dropout.cli.landscape_tables import difference_table, landscape_origin, landscape_table
from guided_dropout.cli.shared import MakeByDefault
from guided_dropout.errors import DataError

if TYPE_CHECKING:
    from guided_dropout.landscape import Landscape

landscape_app = typer.Typer(
    cls=MakeByDefault,
    help="Measure and draw the loss around a model's weights. `landscape MODEL …` is short for `landscape make MODEL "
    "…`.",
    short_help="Measure and draw the loss around a model's weights.",
    no_args_is_help=True,
)
Plot = Annotated[
    Path | None, typer.Option(help="Draw it to this file: .png, .svg or .pdf; planes as surfaces and contours.")
]
Html = Annotated[Path | None, typer.Option(help="Write a page to turn planes in (needs the extra `plotly`).")]
Level = Annotated[float, typer.Option(help="Nats above the origin's loss below which the area is measured.")]


@landscape_app.command()
def make(
    model: options.Model,
    out: Annotated[Path, typer.Option(help="Folder for the landscape.")],
    text: options.TextOrTask = None,
    task: options.Task = None,
    data: options.TaskData = None,
    columns: options.ColumnNames = None,
    dims: Annotated[int, typer.Option(help="1 for a line, 2 for a plane.")] = 2,
    points: Annotated[int, typer.Option(help="Points along each axis; odd, so that the origin is one.")] = 25,
    radius: Annotated[float, typer.Option(help="Largest step along each axis; 1 is as long as the weights are.")] = 1.0,
    mask: Annotated[
        list[str] | None,
        typer.Option(
            help="Which parameters move: all, or a share by Fisher: top:0.5, bottom:0.5, random:0.5. May be given "
            "several times; a = at the end (top:0.5=) is --equal-norm for that one."
        ),
    ] = None,
    profile: Annotated[str | None, typer.Option(help=f"For top and bottom: {options.PROFILE_HELP}.")] = None,
    mask_level: Annotated[
        str, typer.Option(help="Shares are of parameters ('parameter') or of whole tensors, as published ('tensor').")
    ] = "parameter",
    equal_norm: Annotated[
        bool, typer.Option("--equal-norm", help="Make each masked step as long as the unmasked one.")
    ] = False,
    both_norms: Annotated[
        bool, typer.Option("--both-norms", help="Each mask twice: with its own length and with the unmasked one.")
    ] = False,
    direction: Annotated[
        str, typer.Option(help="gaussian, or hessian: the directions in which the loss curves most.")
    ] = "gaussian",
    to: Annotated[
        str | None, typer.Option("--to", help="Along the first axis toward this model, fine-tuned from MODEL; 1 is it.")
    ] = None,
    normalise: Annotated[
        str, typer.Option(help="Gaussian directions get the weights' norm per filter or tensor, or none.")
    ] = "filter",
    vectors: Annotated[
        str, typer.Option(help="Biases and scales of normalisations are held (Li et al., 2018) or moved.")
    ] = "held",
    seeds: Annotated[int, typer.Option(help="Number of directions, each a landscape; 3 or more make intervals.")] = 1,
    seed: Annotated[int, typer.Option(help="The first direction's seed; also draws the samples.")] = 0,
    samples: Annotated[str, typer.Option(help="How many samples to draw from the text.")] = "64",
    max_length: options.MaxLength = 128,
    max_characters: options.MaxCharacters = None,
    objective: options.Objective = "auto",
    batch_size: options.BatchSize = 32,
    resume: options.Resume = None,
    keep_directions: Annotated[
        bool,
        typer.Option("--keep-directions", help="Write the directions too; a seed alone gives Gaussian ones again."),
    ] = False,
    device: options.Device = None,
    dtype: options.Dtype = "float32",
    plot: Plot = None,
    html: Html = None,
    level: Level = 1.0,
) -> None:
    """Evaluate the loss on a line or plane around the weights, the same text at each point."""
    from guided_dropout.artefacts import beside, check_output_folder
    from guided_dropout.devices import to_device
    from guided_dropout.fisher import FisherProfile
    from guided_dropout.fisher.processes import current_processes, leave_processes
    from guided_dropout.landscape import Landscape, Mask, landscape, loss_landscape, record, toward
    from guided_dropout.landscape.grid import Grid
    from guided_dropout.models import load_model

    state = beside(out, ".checkpoint")
    world = current_processes()
    with world.together():
        Grid(dims, points, radius)
        if world.is_main:
            check_output_folder(out, marker=landscape.JSON_NAME)
        finished = None
        if resume and world.is_main and not record.holds_points(state) and (out / landscape.JSON_NAME).exists():
            finished = Landscape.from_pretrained(out, directions=keep_directions)
        if resume is None:
            record.check_unused(state)
        given = Given(
            model=model, text=text, task=task, data=data, columns=columns, samples=samples, objective=objective,
            max_characters=max_characters, max_length=max_length, dtype=dtype, seed=seed,
        )  # fmt: skip
        if seeds < 1:
            raise DataError(f"--seeds {seeds}; expected at least 1")
        if to is not None and direction != "gaussian":
            raise DataError(
                f"--direction {direction} with --to, which is a direction itself; expected one of them: leave one out"
            )
        _check_shown(plot, html, dims, level)
        masks = [Mask.parse(name, equal_norm=equal_norm) for name in mask or ["all"]]
        if both_norms:
            masks = list(dict.fromkeys(m for own in masks for m in _both(own)))
        measured = FisherProfile.from_pretrained(profile) if profile else None
        loaded, inputs = given.load(shown=world.is_main)
        if measured is not None and world.is_main and (note := measured.weights_note(loaded)):
            console.print(note, style="dim", highlight=False)
        directions = direction if to is None else [toward(loaded, load_model(to, given.precision))]
        loaded = to_device(loaded, device or world.device)
    share = "points" if world.count == 1 else f"points of process 1 of {world.count}"
    with (
        interrupts_wait() as stop_if_asked,
        resumable(state, record.holds_points, told=world.is_main),
        progress_bar(share, None, shown=world.is_main) as update,
    ):

        def progress(done: int, total: int) -> None:
            update(done, total)
            stop_if_asked()

        made = loss_landscape(
            loaded,
            inputs.samples,
            directions=directions,
            masks=masks,
            profile=measured,
            mask_level=mask_level,
            normalise=normalise,
            vectors=vectors,
            dims=dims,
            points=points,
            radius=radius,
            seeds=range(seed, seed + seeds),
            objective=objective,
            batch_size=batch_size,
            keep_directions=keep_directions or None,
            checkpoint=state,
            resume=resume,
            finished=finished,
            distributed=world.count > 1,
            progress=progress,
            facts=inputs.facts,
        )
        with world.together():  # in here a signal waits: it does not lose a finished grid
            if world.is_main and finished is None:
                made.save_pretrained(out)
                record.remove_record(state)
    with world.together():
        if world.is_main:
            if finished is not None:
                console.print("the landscape of this run is there already: nothing was measured")
            _print(made, level)
            _draw(made, plot, html)
            console.print(out)
    leave_processes()


@landscape_app.command()
def show(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that `landscape` wrote.")],
    plot: Plot = None,
    html: Html = None,
    level: Level = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print all numbers, seed by seed, as JSON.")] = False,
) -> None:
    """Print a landscape's numbers, with intervals over the seeds, masks compared; draw it."""
    from guided_dropout.landscape import Landscape

    found = Landscape.from_pretrained(folder)
    _check_shown(plot, html, found.grid.dims, level)
    if as_json:
        import json

        from guided_dropout.landscape.compare import as_json as numbers

        print(json.dumps(numbers(found, level=level), indent=1), flush=True)
    else:
        _print(found, level)
    _draw(found, plot, html)


def _both(mask: Any) -> list[Any]:
    from dataclasses import replace

    if mask.kind == "all":
        return [mask]
    return [replace(mask, equal_norm=False), replace(mask, equal_norm=True)]


def _check_shown(plot: Path | None, html: Path | None, dims: int, level: float) -> None:
    from guided_dropout.landscape.compare import check_level

    check_level(level)
    if plot is not None:
        from guided_dropout.plots.figures import check_figure_name

        check_figure_name(plot)
    if html is not None:
        from guided_dropout.plots.interactive import check_page

        check_page(html, dims)


def _print(made: Landscape, level: float) -> None:
    console.print(landscape_origin(made), highlight=False)
    console.print()
    console.print(landscape_table(made, level=level))
    compared = difference_table(made, level=level)
    if compared is not None:
        console.print()
        console.print(compared)


def _draw(made: Landscape, plot: Path | None, html: Path | None) -> None:
    if plot is not None:
        from guided_dropout.plots.figures import save_figure
        from guided_dropout.plots.landscape import figure_of_landscape

        console.print(save_figure(figure_of_landscape(made), plot))
    if html is not None:
        from guided_dropout.plots.interactive import save_surfaces

        console.print(save_surfaces(made, html))
