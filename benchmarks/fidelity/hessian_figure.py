"""``python -m benchmarks.fidelity.hessian_figure FILE.json… OUT.png``: what hessian.py found, by layer and kind."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from guided_dropout.artefacts import read_json
from guided_dropout.plots.figures import save_figure
from guided_dropout.plots.style import INK, plain, series

ENDS = ("before", "after")


def draw(found: Sequence[Mapping[str, Any]]) -> Figure:
    """A panel for each result: layers across, rank correlations with their intervals up, kinds by colour and mark."""
    kinds = list(dict.fromkeys(row["kind"] for result in found for row in result["by_layer"]))
    lowest = min([-0.55, *(row["interval"][0] for result in found for row in result["by_layer"])])
    figure = Figure(figsize=(5.2 * len(found), 3.6), layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for ax, result in zip(panels, found, strict=True):
        rows = result["by_layer"]
        layers = sorted({row["layer"] for row in rows} - set(ENDS), key=int)
        order = [name for name in ("before", *layers, "after") if any(row["layer"] == name for row in rows)]
        for number, kind in enumerate(kinds):
            own = [row for row in rows if row["kind"] == kind]
            color, marker, _ = series(number)
            at = [order.index(row["layer"]) + 0.11 * (number - (len(kinds) - 1) / 2) for row in own]
            middle = [row["spearman"] for row in own]
            beside = [[abs(row["interval"][i] - row["spearman"]) for row in own] for i in (0, 1)]
            ax.errorbar(at, middle, beside, fmt=marker, color=color, markersize=5, elinewidth=1, label=kind)
        ax.axhline(0, color=INK, linewidth=0.8)
        ax.set_xticks(range(len(order)), order)
        facts = result["provenance"]
        ax.set_title(f"{facts['model']['name_or_path']}, {facts['num_samples']} samples", fontsize=9)
        ax.set_xlabel("layer")
        ax.set_ylim(lowest - 0.05, 1.05)
        plain(ax)
    panels[0].set_ylabel("rank correlation of Fisher and\nHessian diagonal (95 % interval)")
    columns = len(kinds) if len(found) > 1 else -(-len(kinds) // 2)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=columns, frameon=False)
    return figure


def main() -> None:
    """Files in, figure out."""
    *files, out = map(Path, sys.argv[1:])
    found = [read_json(file, kind="fisher-against-hessian", schema=2) for file in files]
    print(save_figure(draw(found), out))


if __name__ == "__main__":
    main()
