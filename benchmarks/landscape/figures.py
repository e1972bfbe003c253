"""``python -m benchmarks.landscape.figures``: Figures 1 and 2 of the paper for a model, with numbers and intervals.

Measures the Fisher information on one draw of samples and the losses on another, draws planes (all, top half, bottom
half) and lines (the top, bottom and random shares, each with its own length and with the unmasked one), and writes what
a claim needs: the losses, all numbers seed by seed, pictures. Kill it and start it again: it goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from PIL import Image

from guided_dropout import FisherProfile, estimate_fisher
from guided_dropout.artefacts import staged_file, write_json, write_text
from guided_dropout.cli.inputs import open_text
from guided_dropout.cli.landscape_tables import number_text
from guided_dropout.inputs import MAX_CHARACTERS, text_inputs
from guided_dropout.landscape import Landscape, loss_landscape
from guided_dropout.landscape.compare import as_json, differences, numbers
from guided_dropout.landscape.record import remove_record
from guided_dropout.models import load_lm, load_tokenizer
from guided_dropout.plots.figures import figure_of, save_figure
from guided_dropout.plots.landscape import figure_lines, figure_planes, plot_shares
from guided_dropout.stats import PairedComparison

PLANES = ["all", "top:0.5", "bottom:0.5"]
SHARES = (0.8, 0.4, 0.1, 0.01, 0.0025)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.landscape.figures", description=__doc__)
    p.add_argument("--model", default="demo", help="'demo', a folder or a name on the hub")
    p.add_argument("--text", default="demo", help="'demo' or a text file")
    p.add_argument("--name", default="demo", help="of the result's folder: landscape-NAME")
    p.add_argument("--samples", type=int, default=64, help="samples whose loss is taken")
    p.add_argument("--fisher-samples", type=int, default=256, help="samples that the Fisher is measured on")
    p.add_argument("--max-length", type=int, default=64, help="tokens per sample")
    p.add_argument("--plane-points", type=int, default=21, help="along each axis of a plane")
    p.add_argument("--line-points", type=int, default=13, help="of a line")
    p.add_argument("--seeds", type=int, default=5, help="directions")
    p.add_argument("--radius", type=float, default=1.0, help="the largest step")
    p.add_argument("--shares", type=float, nargs="+", default=list(SHARES), help="of the lines")
    p.add_argument("--work", type=Path, default=Path("build/landscape"), help="folder for what can be made again")
    p.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    p.add_argument("--figures", type=Path, default=Path("docs/figures"), help="folder of the pictures")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Fisher, planes, lines, numbers, pictures."""
    args = arguments(argv)
    work = args.work / args.name
    model, tokenizer = load_lm(args.model), load_tokenizer(args.model)
    lines = open_text(args.text, MAX_CHARACTERS)

    def drawn(number: int, seed: int) -> Any:
        inputs = text_inputs(model, tokenizer, lines, num_samples=number, max_length=args.max_length, seed=seed)
        return inputs.samples

    facts = {"source": args.name, "text": lines.name, "max_length": args.max_length}
    if not (work / "profile").exists():
        made = estimate_fisher(model, drawn(args.fisher_samples, 0), batch_size=16, facts={**facts, "seed": 0})
        made.save_pretrained(work / "profile")
    profile = FisherProfile.from_pretrained(work / "profile")
    samples = drawn(args.samples, 1)
    own = [f"{kind}:{share:g}" for share in args.shares for kind in ("top", "random", "bottom")]
    jobs: dict[str, dict[str, Any]] = {
        "planes": {"dims": 2, "points": args.plane_points, "masks": PLANES},
        "lines": {
            "dims": 1,
            "points": args.line_points,
            "masks": ["all", *own, *(f"{name}=" for name in own)],
            "seeds": range(args.seeds),
        },
    }
    found = {}
    for job, options in jobs.items():
        if not (work / job).exists():
            state = work / f"{job}.checkpoint"
            landscape = loss_landscape(
                model, samples, profile=profile, radius=args.radius, checkpoint=state, resume=True,
                progress=lambda done, total, job=job: print(f"\r{job} {done}/{total}", end="", flush=True),
                facts={**facts, "seed": 1}, **options,
            )  # fmt: skip
            landscape.save_pretrained(work / job)
            remove_record(state)
            print()
        found[job] = Landscape.from_pretrained(work / job)
    write(args, found["planes"], found["lines"])


def write(args: argparse.Namespace, planes: Landscape, lines: Landscape) -> None:
    """Losses, numbers, README, pictures."""
    folder = args.results / f"landscape-{args.name}"
    for name, landscape in (("planes", planes), ("lines", lines)):
        landscape.save_pretrained(folder / name)
        write_json(folder / f"{name}-numbers.json", as_json(landscape))
    write_text(folder / "README.md", readme(args, planes, lines))
    figures = {
        "planes": figure_planes(planes),
        "lines": figure_lines(lines),
        "lines-equal-length": figure_lines(lines, equal_norm=True),
        "shares": figure_of(plot_shares(lines)),
        "shares-equal-length": figure_of(plot_shares(lines, equal_norm=True)),
    }
    for name, figure in figures.items():
        print(smaller(save_figure(figure, args.figures / f"landscape-{args.name}-{name}.png")))
    print(folder)


def smaller(path: Path) -> Path:
    """The same picture in 128 colours and two thirds the size, for a page that many load."""
    picture = Image.open(path).convert("RGB")
    picture = picture.resize((picture.width * 2 // 3, picture.height * 2 // 3), Image.Resampling.LANCZOS)
    with staged_file(path) as tmp:
        picture.quantize(128).save(tmp, format="png", optimize=True)
    return path


def readme(args: argparse.Namespace, planes: Landscape, lines: Landscape) -> str:
    """What was done, and the numbers."""
    facts = lines.provenance
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("torch", "transformers", "numpy"))
    text = [
        f"# Loss landscapes of {args.name}",
        "",
        f"{lines.num_samples} samples of up to {args.max_length} tokens of {facts['text']} (drawn with seed 1, masked "
        f"once), {lines.objective}; loss at the weights as they are {lines.origin_loss:.4f} nats. Fisher profile: "
        f"{args.fisher_samples} samples drawn with seed 0. Gaussian directions, filter-normalised, vectors held. "
        f"Planes: {planes.grid.points}² points on [-{planes.grid.radius:g}, {planes.grid.radius:g}], seed "
        f"{planes.seeds[0]}. Lines: {lines.grid.points} points, seeds {lines.seeds[0]} to {lines.seeds[-1]}. "
        f"{versions}; {facts['date'][:10]}.",
        "",
        "Means over the seeds, 95 % t intervals in brackets; `=` marks steps made as long as the unmasked one; ≥: it "
        "meets the line's end, so that there is more; not resolved: the points are too far apart for it, or rounding "
        "may be half of it.",
        "",
    ]
    by = {(n.mask, n.measure): n for n in numbers(lines)}
    names = list(dict.fromkeys(n.measure for n in by.values()))
    text += ["| mask | moved | length | " + " | ".join(names) + " |", "|---" * (len(names) + 3) + "|"]
    for i, mask in enumerate(lines.masks):
        cells = [f"`{mask.name}`", f"{lines.moved[i, 0]:,}", f"{lines.lengths[i, :, 0].mean():.3g}"]
        text.append("| " + " | ".join([*cells, *(number_text(by[mask.name, name]) for name in names)]) + " |")
    compared = differences(lines)
    text += [
        "",
        f"## The same share against its controls, seed by seed ({len(compared)} intervals, not corrected)",
        "",
        "| mask | against | in | difference | |",
        "|---|---|---|---|---|",
        *(
            f"| `{d.first}` | `{d.second}` | {d.measure} | {_shown(d.comparison)} | {d.verdict} |"
            for d in compared
            if d.measure in (f"rise at {lines.grid.radius:g}", "curvature", "curvature per length²")
        ),
    ]
    return "\n".join([*text, ""])


def _shown(compared: PairedComparison) -> str:
    interval = compared.t_interval
    return f"{compared.mean:.3g}" + (f" [{interval[0]:.3g}, {interval[1]:.3g}]" if interval else "")


if __name__ == "__main__":
    main()
