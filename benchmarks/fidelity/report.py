"""From the results of `fidelity`, profiles and `hessian.py` to what is committed: figures and a README.

python -m benchmarks.fidelity.report FOLDER --profile PROFILE

FOLDER holds ``fidelity.json`` and perhaps ``hessian.json``; figures and the README go there.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.fidelity import hessian_figure
from guided_dropout import FisherProfile
from guided_dropout.artefacts import read_json, write_text
from guided_dropout.fidelity import Fidelity
from guided_dropout.fidelity.table import markdown
from guided_dropout.fisher.spectrum import spectrum
from guided_dropout.plots.figures import save_figure
from guided_dropout.plots.fisher import draw_fidelity, draw_layers, draw_lorenz, draw_spectrum


def main() -> None:
    """Figures and README of one model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--profile", required=True)
    parser.add_argument("--name", help="of the model; default: what the profile says")
    given = parser.parse_args()
    result, profile = Fidelity.load(given.folder / "fidelity.json"), FisherProfile.from_pretrained(given.profile)
    name = given.name or profile.title.rstrip("/").rpartition("/")[2]
    figures: dict[str, Figure] = {
        "fidelity": draw_fidelity(result),
        "spectrum": draw_spectrum({name: profile}),
        "lorenz": draw_lorenz({name: profile}),
        "layers": draw_layers({name: profile}),
        "layers-mean": draw_layers({name: profile}, measure="mean"),
    }
    for title, figure in figures.items():
        save_figure(figure, given.folder / f"{title}.png")
    parts = [f"# Fidelity, spectrum and layers: {name}", _how(result), markdown(result), _spread(profile)]
    parts += [f"![{title}]({title}.png)" for title in figures]
    if (given.folder / "hessian.json").exists():
        found = read_json(given.folder / "hessian.json", kind="fisher-against-hessian", schema=2)
        save_figure(hessian_figure.draw([found]), given.folder / "hessian.png")
        parts.append(hessian_section(found))
    write_text(given.folder / "README.md", "\n\n".join(part.strip() for part in parts) + "\n")


def _how(result: Fidelity) -> str:
    p = result.provenance
    versions = ", ".join(
        f"{k} {p['versions'][k]}" for k in ("guided-dropout", "torch", "transformers", "numpy", "scipy")
    )
    return (
        f"{result.num_samples:,} samples of up to {p['max_length']} tokens of {Path(p['text']).name}, "
        f"{result.num_parameters:,} parameters ranked, {len(result.noise)} tensors of rounding noise left out; "
        f"{result.draws} draws, seed {result.seed}; {p['platform']}, {p['device']}, {p['dtype']}; "
        f"{p['date'][:10]}; {versions}."
    )


def _spread(profile: FisherProfile) -> str:
    s = spectrum(profile)
    held = ", ".join(f"{100 * f:g} % hold {100 * s.top_share(f):.1f} %" for f in (0.0001, 0.001, 0.01, 0.1, 0.5))
    return (
        f"Of all the Fisher information the largest {held}; Gini coefficient {s.gini:.3f}; "
        f"{100 * s.num_zeros / s.num_parameters:.2f} % of the parameters are exactly zero."
    )


def hessian_section(found: Mapping[str, Any]) -> str:
    """What `hessian.py` found, as Markdown."""
    p, means = found["provenance"], found["tensor_means"]
    ceiling = means["ceiling"]
    lines = [
        "## The Fisher beside the Hessian",
        f"Rank correlation (Spearman) of the Fisher's diagonal with exact elements of the Hessian's, on "
        f"{p['num_samples']} samples of up to {p['max_length']} tokens; 95 % bootstrap intervals over parameters.",
        "| layer | kind | parameters | Fisher – Hessian | Hessian negative |\n|---|---|---|---|---|\n"
        + "\n".join(
            f"| {r['layer']} | {r['kind']} | {r['parameters']:,} | {r['spearman']:.2f} "
            f"[{r['interval'][0]:.2f}, {r['interval'][1]:.2f}] | {100 * r['negative']:.0f} % |"
            for r in found["by_layer"]
        ),
        f"Means of {means['tensors']} tensors, the Hessian's by Hutchinson's method with {p['vectors']} Rademacher "
        f"vectors: {means['spearman']:.2f}"
        + (f"; a perfect agreement would show {ceiling:.2f} at that error" if ceiling else "")
        + f". {means['negative']} of the Hessian's are negative.",
        "![hessian](hessian.png)",
    ]
    return "\n\n".join(lines)


if __name__ == "__main__":
    main()
