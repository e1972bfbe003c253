"""The command line's `schedule`: make, control, show, diff."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from guided_dropout.cli.console import console, depth_chart, diff_table, schedule_origin, schedule_table
from guided_dropout.cli.options import PROFILE_HELP, Grouping, ResidualSites
from guided_dropout.cli.shared import MakeByDefault
from guided_dropout.errors import ScheduleError, unknown

if TYPE_CHECKING:
    from guided_dropout.schedule import DropoutSchedule

schedule_app = typer.Typer(
    cls=MakeByDefault,
    help="Make, show and compare schedules, and the controls that they have to beat. `schedule PROFILE --out FILE` "
    "is short for `schedule make PROFILE --out FILE`.",
    short_help="Turn a profile into a dropout rate for each site; derive controls; show and compare schedules.",
    no_args_is_help=True,
)


@schedule_app.command()
def make(
    out: Annotated[Path, typer.Option(help="Schedule file (JSON).")],
    profile: Annotated[str | None, typer.Argument(metavar="PROFILE", help=f"The profile: {PROFILE_HELP}.")] = None,
    upper: Annotated[float, typer.Option(help="Rate of the least informative site.")] = 0.1,
    lower: Annotated[float, typer.Option(help="Rate of the most informative site.")] = 0.0,
    shape: Annotated[
        str,
        typer.Option(
            help="How the rate falls with the score: linear, cosine, exponential[:decay], step[:groups], proportional "
            "(to the log score) or paper_code (BERT-base, as the authors' script)."
        ),
    ] = "linear",
    grouping: Grouping = "owner",
    aggregate: Annotated[
        str, typer.Option(help="Their values as one score: tensor_mean, parameter_mean, sum, max or top_share.")
    ] = "tensor_mean",
    mean_rate: Annotated[
        float | None, typer.Option(help="Multiply all rates by one number such that this is their mean.")
    ] = None,
    rates: Annotated[
        Path | None,
        typer.Option(help="Rates one by one, in place of PROFILE: JSON or CSV of path and rate; needs --model."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Take the sites from this model, not from the profile's own.")
    ] = None,
    residual_sites: ResidualSites = False,
) -> None:
    """Turn a profile, or a table of rates, into a schedule: a dropout rate for each site."""
    from guided_dropout.artefacts import check_output_file
    from guided_dropout.fisher import FisherProfile
    from guided_dropout.models import load_model
    from guided_dropout.regularizers.residual import added_sites
    from guided_dropout.schedule import DropoutSchedule
    from guided_dropout.schedule.files import KIND

    check_output_file(out, kind=KIND)
    if profile is not None and rates is not None:
        raise ScheduleError(f"both the profile {profile} and --rates {rates}; expected one of the two: leave one out")
    measured, source = None, model
    if profile is not None:
        measured = FisherProfile.from_pretrained(profile)
        source = source or measured.provenance.get("source") or measured.model.get("name_or_path")
        if not source:
            raise ScheduleError(f"{profile} does not say which model it was measured on; name it with --model")
        loaded = load_model(source)
        with added_sites(loaded, residual_sites):
            planned = DropoutSchedule.from_profile(
                measured,
                loaded,
                upper=upper,
                lower=lower,
                shape=_named(shape),
                grouping=grouping,
                aggregate=aggregate.replace("-", "_"),
                mean_rate=mean_rate,
            )
    elif rates is not None:
        if not model:
            raise ScheduleError("--rates without a model; name the model whose sites they are with --model")
        if (upper, lower, shape, grouping, aggregate) != (0.1, 0.0, "linear", "owner", "tensor_mean"):
            raise ScheduleError(
                "--rates gives the rates one by one; leave out --upper, --lower, --shape, --grouping and --aggregate"
            )
        loaded = load_model(model)
        with added_sites(loaded, residual_sites):
            planned = DropoutSchedule.from_rates(rates, loaded)
        planned = planned if mean_rate is None else planned.with_mean(mean_rate)
    else:
        raise ScheduleError("no profile; expected a folder that `guided-dropout fisher` wrote, or --rates FILE")
    path = planned.save(out)
    console.print(schedule_table(planned, console.width))
    console.print(schedule_origin(planned), highlight=False)
    if measured is not None and (note := measured.weights_note(loaded)):
        console.print(note, style="dim", highlight=False)
    console.print(path)


@schedule_app.command()
def control(
    schedule: Annotated[Path, typer.Argument(metavar="FILE", help="Schedule file that the control has to match.")],
    kind: Annotated[
        str,
        typer.Option(
            help="uniform (the mean rate everywhere), top-only (the most informative site has its rate, all others the "
            "mean of theirs), role-mean (each kind of site has its mean rate in all layers), "
            "reversed (the most informative site gets the highest rate), "
            "shuffled (dealt out by chance), depth-linear (rising from the first call to the last) or magnitude (by "
            "the squares of the weights)."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Schedule file (JSON) of the control.")],
    seed: Annotated[int | None, typer.Option(help="Of shuffled: which permutation.", show_default="0")] = None,
    k: Annotated[
        int | None, typer.Option(metavar="K", help="Of top-only: how many sites have theirs.", show_default="1")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Of magnitude: the pretrained model.", show_default="the one the schedule was made on"),
    ] = None,
) -> None:
    """Derive a control from a schedule: the same sites at the same mean rate, without the guidance."""
    from guided_dropout.artefacts import check_no_input, check_output_file
    from guided_dropout.schedule import DropoutSchedule, controls
    from guided_dropout.schedule.files import KIND

    check_output_file(out, kind=KIND)
    check_no_input(out, [schedule])
    name = kind.replace("-", "_")
    if name not in controls.CONTROLS:
        raise ScheduleError(unknown("control", kind, [known.replace("_", "-") for known in controls.CONTROLS]))
    for option, value, user in (("--seed", seed, "shuffled"), ("--k", k, "top-only"), ("--model", model, "magnitude")):
        if value is not None and name != user.replace("-", "_"):
            raise ScheduleError(
                f"{option} {value} with --kind {kind}; expected it with --kind {user} only: leave it out"
            )
    planned = DropoutSchedule.load(schedule)
    if name == "shuffled":
        derived = controls.shuffled(planned, seed or 0)
    elif name == "top_only":
        derived = controls.top_only(planned, 1 if k is None else k)
    elif name == "magnitude":
        derived = _by_magnitude(planned, schedule, model)
    else:
        derived = getattr(controls, name)(planned)
    controls.check_apart(kind, derived, planned)
    path = derived.save(out)
    console.print(schedule_table(derived, console.width))
    console.print(schedule_origin(derived), highlight=False)
    console.print(path)


def _named(shape: str) -> str:
    """A shape's name with hyphens is the one with underscores; what follows a colon is a number."""
    name, colon, number = shape.partition(":")
    return name.replace("-", "_") + colon + number


def _by_magnitude(planned: DropoutSchedule, file: Path, model: str | None) -> DropoutSchedule:
    from guided_dropout.models import load_model
    from guided_dropout.regularizers.residual import added_sites
    from guided_dropout.residual import ATTRIBUTE
    from guided_dropout.schedule import controls

    source = model or planned.model.get("name_or_path")
    if not source:
        raise ScheduleError(f"{file} does not say which model it was made on; name it with --model")
    loaded = load_model(source)
    with_residual_sites = any(path.endswith(f".{ATTRIBUTE}") for path in planned.rates)
    with added_sites(loaded, with_residual_sites):
        derived = controls.magnitude(planned, loaded)
    if note := planned.weights_note(loaded):
        console.print(note, style="dim", highlight=False)
    return derived


@schedule_app.command()
def show(
    schedule: Annotated[Path, typer.Argument(metavar="FILE", help="Schedule file that `schedule` wrote.")],
    plot: Annotated[Path | None, typer.Option(help="Draw the rates over depth to this file: .png or .svg.")] = None,
) -> None:
    """Print a schedule: where it comes from, each site's rate, the rates over depth."""
    from guided_dropout.schedule import DropoutSchedule

    planned = DropoutSchedule.load(schedule)
    if plot:
        from guided_dropout.plots.figures import figure_of, plot_schedule, save_figure

        save_figure(figure_of(plot_schedule(planned)), plot)
    console.print(schedule_origin(planned), highlight=False)
    console.print()
    console.print(schedule_table(planned, console.width))
    console.print()
    console.print(depth_chart(planned))
    if plot:
        console.print(plot)


@schedule_app.command()
def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="Schedule file.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Schedule file.")],
) -> None:
    """Compare two schedules: rates, order and mean; sites are matched whatever head the models have."""
    from guided_dropout.schedule import DropoutSchedule
    from guided_dropout.schedule.compare import diff as compare

    schedules = [DropoutSchedule.load(path) for path in (first, second)]
    found = compare(*schedules)
    for name, path, planned in zip("AB", (first, second), schedules, strict=True):
        console.print(f"{name} {path}: shape {planned.shape}, mean rate {planned.mean_rate:.4f}", highlight=False)
    if found.changes:
        console.print()
        console.print(diff_table(found))
    for name, sites in (("A", found.only_first), ("B", found.only_second)):
        if sites:
            console.print(f"in {name} only: {', '.join(sites)}", highlight=False)
    tau = "not defined (it needs two sites with different rates)" if found.tau is None else f"{found.tau:+.3f}"
    console.print(f"order of the sites by rate: Kendall's tau {tau}", highlight=False)
