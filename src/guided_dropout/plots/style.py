"""What all figures share: colours, series, axes without frills.

The colours are Okabe and Ito's, told apart by the colour-blind; marks, lines and hatches tell them apart in grey.
"""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, INK, GREY = "#0072B2", "#D55E00", "#222222", "#8a8a8a"
SERIES = tuple(
    zip(
        (BLUE, ORANGE, "#009E73", "#CC79A7", "#56B4E9", "#E69F00", INK),
        "osD^vPX",
        ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3)), (0, (1, 3))),
        strict=True,
    )
)


def series(number: int) -> tuple[str, str, Any]:
    """Colour, marker and line of a series; the three part ways from the eighth on, so that pairs stay distinct."""
    lap, place = divmod(number, len(SERIES))
    color, _, line = SERIES[place]
    return color, SERIES[(place + lap) % len(SERIES)][1], line


def new_axes(width: float, height: float) -> Axes:
    """Axes on a figure of their own, of that size in inches."""
    return Figure(figsize=(width, height), layout="constrained").add_subplot()


def plain(ax: Axes) -> None:
    """A light grid behind the data, and no frame."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(visible=True, color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)


def percent(x: float, _: Any = None) -> str:
    """A share as a tick's label, in per cent."""
    return f"{100 * x:.8f}".rstrip("0").rstrip(".") + " %"


def as_text(label: str) -> str:
    r"""A label as it stands: a ``$`` would begin a formula, and a ``_`` in front keeps a line out of the legend."""
    return (" " if label.startswith("_") else "") + label.replace("$", r"\$")
