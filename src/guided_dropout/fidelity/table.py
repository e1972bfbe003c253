"""Fidelity as tables: in the layout of the paper's Table 1, and the schedules."""

from __future__ import annotations

from collections.abc import Sequence

from guided_dropout.fidelity.paper import TABLE_1
from guided_dropout.fidelity.result import Fidelity, Values, mean_and_deviation

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Heads of the columns, and the rows."""

_SHOWN = {
    "overlap": "overlap",
    "spearman": "Spearman",
    "pearson": "Pearson",
    "cosine": "cosine",
    "js": "JS",
    "kl": "KL",
    "mean_error": "mean err",
    "rms_error": "RMS err",
}
SHORT = ("overlap", "spearman", "cosine", "js", "mean_error", "rms_error")
"""Those that fit on a terminal."""
PAPER = "paper's four"
PAPER_NOTE = (
    f"{PAPER}: Table 1 of Sharma et al. (2024), BERT-base on WikiText-103, one draw; the heads of its columns are "
    "lost in the copy at hand: the first is a similarity, the others are errors. It is another model on another text: "
    "not to be compared figure by figure."
)


def parameters_table(result: Fidelity, metrics: Sequence[str] = tuple(_SHOWN)) -> Table:
    """A row for each share and fraction: the metrics, mean ± standard deviation over the draws, and the paper's."""
    with_paper = any((cell.fraction, cell.top) in TABLE_1 for cell in result.cells)
    rows = []
    for top in result.tops:
        for cell in (cell for cell in result.cells if cell.top == top):
            row = [_percent(top), _percent(cell.fraction), f"{cell.samples:,}"]
            row += [shown(cell.values[metric]) for metric in metrics]
            if with_paper:
                row.append(" ".join(f"{v:.3f}" for v in TABLE_1.get((cell.fraction, top), ())))
            rows.append(row)
    return ["top", "text", "samples", *(_SHOWN[m] for m in metrics), *([PAPER] if with_paper else [])], rows


def schedule_table(result: Fidelity) -> Table:
    """A row for each fraction: tau, sites that moved, the largest move; mean ± standard deviation over the draws."""
    rows = [
        [
            _percent(order.fraction),
            f"{order.samples:,}",
            shown(order.values["tau"]),
            shown(order.values["moved"], 1),
            shown(order.values["largest_move"], 1),
        ]
        for order in result.orders
    ]
    return ["text", "samples", "Kendall's tau", f"sites of {result.sites} that moved", "largest move, places"], rows


def summary(result: Fidelity) -> list[str]:
    """What follows from it, a sentence each."""
    whole = f"all {result.num_samples:,} samples"
    without = [f"{result.num_skipped:,} samples without a target were left out."] if result.num_skipped else []
    if result.curve is None or result.bootstrap is None or result.recommended is None:
        return [*without, f"{result.sites} dropout sites, no two of which differ in score: no order to compare."]
    lines = [
        *without,
        f"{result.recommended:,} samples: from there on, at least 95 % of {result.curve['subsamples']} random "
        f"sub-samples order the sites as {whole} do, to a Kendall's tau of {result.tau:g} or more.",
        f"The order of {whole} is itself an estimate: {result.bootstrap['replicates']} bootstrap replicates have a tau "
        f"of {result.bootstrap['mean']:.3f} with it on average, 95 % of them {result.bootstrap['lower']:.3f} or more.",
    ]
    if 3 * result.recommended > result.num_samples:
        lines.append(
            "That is more than a third of the samples, of which any sub-sample is a part: the number needed may be "
            "larger. Measure with more samples."
        )
    return lines


def markdown(result: Fidelity) -> str:
    """Both tables and what follows from them."""
    parts = ["\n".join(summary(result))]
    if result.orders:
        parts.append(_markdown(schedule_table(result)))
    if result.cells:
        parts.append(_markdown(parameters_table(result)))
        parts.append(PAPER_NOTE)
    return "\n\n".join(parts) + "\n"


def shown(values: Values, digits: int = 3) -> str:
    """``0.912 ± 0.004``; a dash where any draw has none."""
    found = mean_and_deviation(values)
    if found is None:
        return "–"
    mean, deviation = found
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if len(values) > 1 else "")


def _percent(share: float) -> str:
    return f"{100 * share:.6f}".rstrip("0").rstrip(".") + " %"


def _markdown(table: Table) -> str:
    heads, rows = table
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))
