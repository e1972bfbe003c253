"""``python -m benchmarks.landscape``: time per point of a loss landscape, beside one plain evaluation forward.

Round after round each method does one point, in an order that turns, so that what else the machine does meets them
all; a round's figures are divided by the same round's plain forward. ``again`` is a second plain forward, which shows
how far two equal things differ. Writes one JSON and a README.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.fisher.__main__ import hardware
from benchmarks.landscape.methods import METHODS, UnavailableError, version_of
from guided_dropout.artefacts import write_json, write_text
from guided_dropout.corpus import lm_samples
from guided_dropout.demo.text import demo_paragraphs
from guided_dropout.devices import to_device
from guided_dropout.landscape.losses import Evaluation
from guided_dropout.models import load_lm, load_tokenizer
from guided_dropout.provenance import provenance
from guided_dropout.texts import stream_text
from guided_dropout.undisturbed import evaluating

RESULTS = Path(__file__).resolve().parents[1] / "results" / "landscape-speed"
KIND, SCHEMA = "landscape-benchmark", 1


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.landscape", description=__doc__)
    p.add_argument("--model", default="demo", help="'demo', a folder or a name on the hub")
    p.add_argument("--text", default="demo", help="'demo' or a text file")
    p.add_argument("--samples", type=int, default=64, help="samples of the text")
    p.add_argument("--max-length", type=int, default=128, help="tokens per sample")
    p.add_argument("--batch-size", type=int, default=32, help="samples per forward")
    p.add_argument("--rounds", type=int, default=20, help="points of each method")
    p.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="NAME", help="which")
    p.add_argument("--device", help="for instance cuda; a GPU if there is any by default")
    p.add_argument("--out", type=Path, help="folder of the results; by default one of the model's name")
    return p.parse_args(argv)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds per point of each method, and the ratios to the plain forward of the same round."""
    model, tokenizer = to_device(load_lm(args.model), args.device), load_tokenizer(args.model)
    lines = demo_paragraphs() if args.text == "demo" else stream_text(args.text)
    samples = lm_samples(lines, tokenizer, objective="mlm", num_samples=args.samples, max_length=args.max_length)
    evaluation = Evaluation(model, samples, batch_size=args.batch_size)
    names = list(dict.fromkeys(["forward", *args.methods]))
    times: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    for i in range(args.rounds + 1):  # the first is for warming up
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            if name not in failed:
                try:
                    took = _time_of(name, args.model, evaluation, i)
                except UnavailableError as e:
                    failed[name] = str(e)
                except Exception as e:
                    failed[name] = f"{type(e).__name__}: {e}"[:200]
                else:
                    times.setdefault(name, []).extend([took] if i else [])
    return {
        "kind": KIND,
        "schema": SCHEMA,
        "model": Path(args.model).name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "text": Path(args.text).name,
        "samples": evaluation.num_samples,
        "max_length": args.max_length,
        "batch_size": args.batch_size,
        "head_at_targets": evaluation.head_at_targets,
        "hardware": hardware(),
        "device": str(next(model.parameters()).device),
        "rounds": args.rounds,
        "provenance": provenance(),
        "methods": {
            name: {
                "what": " ".join((METHODS[name][0].__doc__ or "").split()),
                "version": version_of(name),
                "seconds_per_point": _spread(own),
                "ratio_to_forward": _spread([a / b for a, b in zip(own, times["forward"], strict=True)]),
            }
            for name, own in times.items()
            if len(own) == args.rounds
        },
        "failed": failed,
    }


def _time_of(name: str, source: str, evaluation: Evaluation, i: int) -> float:
    way, points = METHODS[name]
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(evaluating(evaluation.model))
        point = stack.enter_context(way(source, evaluation, folder))  # drawing directions is no part of a point
        if name in ("row", "plane"):
            point(0.1, 0.25)  # the row's weights are there
        _wait(evaluation)
        start = time.perf_counter()
        point(0.01 * (i + 1), -0.01 * (i + 1))
        _wait(evaluation)
        return (time.perf_counter() - start) / points


def _wait(evaluation: Evaluation) -> None:
    device = next(evaluation.model.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _spread(values: list[float]) -> dict[str, Any]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": statistics.median(values), "q25": low, "q75": high, "all": values}


def summary(found: dict[str, Any]) -> str:
    """The README beside the numbers."""
    machine = found["hardware"]
    lines = [
        "# Time per point of a loss landscape",
        "",
        f"`{found['model']}` ({found['parameters']:,} parameters), {found['samples']} samples of up to "
        f"{found['max_length']} tokens in batches of {found['batch_size']}, {found['device']}, {machine['cpu']} "
        f"({machine['cores']} cores, {found['provenance']['threads']} threads), {found['provenance']['date'][:10]}. "
        f"Median of {found['rounds']} rounds, quartiles in brackets; each round's ratio is to its own plain forward.",
        "",
        "| method | seconds per point | ratio to one plain forward | |",
        "|---|---|---|---|",
    ]
    for name, row in found["methods"].items():
        t, r = row["seconds_per_point"], row["ratio_to_forward"]
        version = f" {row['version']}" if row["version"] else ""
        lines.append(
            f"| {name}{version} | {t['median']:.4f} [{t['q25']:.4f}, {t['q75']:.4f}] | {r['median']:.3f} "
            f"[{r['q25']:.3f}, {r['q75']:.3f}] | {row['what']} |"
        )
    lines += [f"| {name} | – | – | did not run: {why} |" for name, why in found["failed"].items()]
    return "\n".join([*lines, ""])


def main(argv: list[str] | None = None) -> None:
    """Measure, write, say where."""
    args = arguments(argv)
    out = args.out or RESULTS / Path(args.model).name
    found = measure(args)
    write_json(out / "landscape.json", found)
    write_text(out / "README.md", summary(found))
    print(summary(found))
    print(out / "landscape.json")


if __name__ == "__main__":
    main()
