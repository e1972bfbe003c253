"""Loss landscapes to turn in a browser, in one file that needs nothing else; with plotly, the extra ``plotly``."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from guided_dropout.artefacts import write_text
from guided_dropout.errors import ArtefactError, DataError
from guided_dropout.landscape.landscape import Landscape
from guided_dropout.plots.landscape import colour_limits


def check_page(path: str | Path, dims: int) -> None:
    """Make sure, before any long work, that a page of a landscape can be made.

    Raises:
        ArtefactError: plotly is not installed, or `path` does not end in ``.html``.
        DataError: a line, which has nothing to turn.
    """
    if Path(path).suffix != ".html":
        raise ArtefactError(f"cannot write a page to {path}; expected a name that ends in .html")
    if dims != 2:
        raise DataError("an interactive page of a line; expected a plane: use --dims 2, or draw a .png")
    if find_spec("plotly") is None:
        raise ArtefactError(
            "an interactive page needs the `plotly` package: pip install 'guided-dropout[plotly]', or draw a .png"
        )


def save_surfaces(
    landscape: Landscape, path: str | Path, *, masks: Sequence[str] | None = None, seed: int | None = None
) -> Path:
    """Write a page with a surface for each mask and a button for each, all on one scale of heights and colours.

    The page holds plotly's script (about 5 MB) and fetches nothing.

    Args:
        landscape: of two dimensions.
        path: the page; ends in ``.html``.
        masks: names of those to draw; all if None.
        seed: of the directions; the first if None.

    Raises:
        ArtefactError: plotly is not installed, or `path` has another ending or cannot be written.
        DataError: a line, or an unknown mask or seed.
    """
    check_page(path, landscape.grid.dims)
    import plotly.graph_objects as go
    from plotly.io import to_html

    names = [m.name for m in landscape.masks] if masks is None else list(masks)
    titles = {m.name: m.title for m in landscape.masks}
    low, high = colour_limits(landscape, names)
    figure: Any = go.Figure()
    for number, name in enumerate(names):
        losses = landscape.surface(name, seed)
        figure.add_surface(
            x=landscape.grid.steps,
            y=landscape.grid.steps,
            z=np.where(np.isfinite(losses), np.minimum(losses, high), high),
            customdata=losses,
            cmin=low,
            cmax=high,
            colorscale="Cividis",
            visible=number == 0,
            name=titles[name],
            colorbar={"title": {"text": "loss (nats)"}, "thickness": 16, "len": 0.7},
            contours={"z": {"show": True, "usecolormap": True, "project": {"z": True}}},
            hovertemplate="α %{x:.3g}<br>β %{y:.3g}<br>loss %{customdata:.4f} nats<extra></extra>",
        )
    buttons = [
        {"label": titles[name], "method": "update", "args": [{"visible": [n == name for n in names]}]} for name in names
    ]
    menu = {"type": "buttons", "direction": "right", "buttons": buttons, "x": 0.02, "y": 1.06, "xanchor": "left"}
    axis = {"backgroundcolor": "white", "gridcolor": "#dddddd", "showbackground": True}
    figure.update_layout(
        title={"text": f"Loss around the weights of {landscape.title}", "x": 0.02},
        font={"family": "system-ui, sans-serif", "size": 14},
        paper_bgcolor="white",
        margin={"l": 0, "r": 0, "t": 90, "b": 0},
        updatemenus=[menu] if len(names) > 1 else [],
        scene={
            "xaxis": {**axis, "title": {"text": "α"}},
            "yaxis": {**axis, "title": {"text": "β"}},
            "zaxis": {**axis, "title": {"text": "loss (nats)"}, "range": [low - 0.2 * (high - low), high]},
            "aspectratio": {"x": 1, "y": 1, "z": 0.75},
            "camera": {"eye": {"x": 1.15, "y": -1.55, "z": 0.85}},
        },
    )
    write_text(Path(path), to_html(figure, include_plotlyjs=True, full_html=True, config={"displaylogo": False}))
    return Path(path)
