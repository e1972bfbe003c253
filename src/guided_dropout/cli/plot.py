"""The command line's `plot`: spectrum, lorenz, layers, fidelity."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from guided_dropout.cli.console import console
from guided_dropout.cli.options import PROFILE_HELP
from guided_dropout.errors import DataError

if TYPE_CHECKING:
    from guided_dropout.fisher import FisherProfile

plot_app = typer.Typer(
    help="Draw profiles, laid over one another, and results of `fidelity`, to .png, .svg or .pdf.",
    no_args_is_help=True,
)

Profiles = Annotated[list[str], typer.Argument(metavar="PROFILE...", help=f"One or more: {PROFILE_HELP}.")]
Out = Annotated[Path, typer.Option(help="Where to: .png, .svg or .pdf.")]
Labels = Annotated[
    str | None, typer.Option(help="Names for the profiles, with commas between them; by default the models'.")
]
_UNITS = "In units of the average parameter's value"


@plot_app.command()
def spectrum(
    profiles: Profiles,
    out: Out,
    normalise: Annotated[bool, typer.Option("--normalise", help=f"{_UNITS}.")] = False,
    labels: Labels = None,
) -> None:
    """All Fisher values from the largest down, on linear and on logarithmic axes."""
    from guided_dropout.plots.figures import check_figure_name, save_figure
    from guided_dropout.plots.fisher import draw_spectrum

    check_figure_name(out)
    console.print(save_figure(draw_spectrum(_read(profiles, labels), normalise=normalise), out))


@plot_app.command()
def lorenz(profiles: Profiles, out: Out, labels: Labels = None) -> None:
    """What the largest k % of the parameters hold of the Fisher information; the Lorenz curve and its Gini."""
    from guided_dropout.plots.figures import check_figure_name, save_figure
    from guided_dropout.plots.fisher import draw_lorenz

    check_figure_name(out)
    console.print(save_figure(draw_lorenz(_read(profiles, labels)), out))


@plot_app.command()
def layers(
    profiles: Profiles,
    out: Out,
    measure: Annotated[
        str, typer.Option(help="share: of the total, by layer and kind; mean: of a parameter, a panel for each kind.")
    ] = "share",
    by_size: Annotated[
        bool, typer.Option("--by-size", help="Layers with the largest share first, not by depth.")
    ] = False,
    normalise: Annotated[bool, typer.Option("--normalise", help=f"{_UNITS}; of --measure mean.")] = False,
    labels: Labels = None,
) -> None:
    """The Fisher information by layer and kind: embedding, attention, intermediate, output, norm, head."""
    from guided_dropout.plots.figures import check_figure_name, save_figure
    from guided_dropout.plots.fisher import draw_layers

    check_figure_name(out)
    figure = draw_layers(_read(profiles, labels), measure=measure, normalise=normalise, by_size=by_size)
    console.print(save_figure(figure, out))


@plot_app.command()
def fidelity(
    result: Annotated[Path, typer.Argument(metavar="FILE", help="What `fidelity` wrote.")],
    out: Out,
) -> None:
    """What sub-samples of a text are worth, against the number of their samples."""
    from guided_dropout.fidelity import Fidelity
    from guided_dropout.plots.figures import check_figure_name, save_figure
    from guided_dropout.plots.fisher import draw_fidelity

    check_figure_name(out)
    console.print(save_figure(draw_fidelity(Fidelity.load(result)), out))


def _read(sources: list[str], labels: str | None) -> dict[str, FisherProfile]:
    """Label → profile; models of the same name are told apart by where their profile came from."""
    from guided_dropout.fisher import FisherProfile

    profiles = [FisherProfile.from_pretrained(source) for source in sources]
    names = [p.title.rstrip("/").rpartition("/")[2] for p in profiles] if labels is None else labels.split(",")
    if len(names) != len(profiles):
        raise DataError(f"{len(names)} labels for {len(profiles)} profiles; expected one for each: --labels A,B")
    seen = Counter(names)
    if labels is not None and len(seen) < len(names):
        raise DataError(f"--labels {labels}; expected a name of its own for each profile")
    names = [f"{name} ({source})" if seen[name] > 1 else name for name, source in zip(names, sources, strict=True)]
    if len(set(names)) < len(names):
        raise DataError(f"profiles {' '.join(sources)}; expected each of them once")
    return dict(zip(names, profiles, strict=True))
