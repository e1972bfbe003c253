"""Draw the dropout sites that `guided-dropout inspect … --json` printed.

python benchmarks/layers_figure.py sites.json layers.svg
"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

from guided_dropout.plots.figures import figure_of, figure_svg, plot_layers


def main() -> None:
    """Sites in, SVG out."""
    sites, out = map(Path, sys.argv[1:])
    figure = figure_of(plot_layers(json.loads(sites.read_text())))
    assert isinstance(figure, Figure)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(figure_svg(figure))


if __name__ == "__main__":
    main()
