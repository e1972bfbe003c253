"""Figures; the only package that imports matplotlib, when a name is asked for, and plotly in ``interactive`` alone."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from guided_dropout.plots.figures import figure_of, plot_layers, plot_schedule, plot_spectrum, save_figure
    from guided_dropout.plots.fisher import draw_fidelity, draw_layers, draw_lorenz, draw_spectrum
    from guided_dropout.plots.interactive import save_surfaces
    from guided_dropout.plots.landscape import (
        colour_limits,
        figure_lines,
        figure_planes,
        plot_contours,
        plot_curves,
        plot_shares,
        plot_surface,
    )

__all__ = [
    "colour_limits",
    "draw_fidelity",
    "draw_layers",
    "draw_lorenz",
    "draw_spectrum",
    "figure_lines",
    "figure_of",
    "figure_planes",
    "plot_contours",
    "plot_curves",
    "plot_layers",
    "plot_schedule",
    "plot_shares",
    "plot_spectrum",
    "plot_surface",
    "save_figure",
    "save_surfaces",
]

_HOMES = {
    "figures": ["figure_of", "plot_layers", "plot_schedule", "plot_spectrum", "save_figure"],
    "fisher": ["draw_fidelity", "draw_layers", "draw_lorenz", "draw_spectrum"],
    "interactive": ["save_surfaces"],
    "landscape": [
        "colour_limits",
        "figure_lines",
        "figure_planes",
        "plot_contours",
        "plot_curves",
        "plot_shares",
        "plot_surface",
    ],
}


def __getattr__(name: str) -> Any:
    home = next((home for home, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
