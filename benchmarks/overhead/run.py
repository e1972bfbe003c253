"""Does guided dropout cost anything? Training steps with guided and with plain dropout, side by side.

    python benchmarks/overhead/run.py                       # the embedded model, eager and compiled
    python benchmarks/overhead/run.py MODEL --schedule FILE --device cuda --steps 200

Copies of one classifier take the same step (forward, backward, AdamW) on the same batch in turn, in all orders one
after another, so that what else the machine does meets them all: ``guided`` has the schedule's
rates, ``dropout`` one rate everywhere, ``again`` is a second copy of ``dropout``, which shows how far two equal things
differ. The result is the median over the rounds of each round's ratio to ``dropout``, with a 95 % bootstrap interval.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from transformers import PreTrainedModel

from guided_dropout import DropoutSchedule, apply_dropout, corpus, estimate_fisher
from guided_dropout.artefacts import write_json
from guided_dropout.demo.text import demo_paragraphs
from guided_dropout.models import load_classifier, load_lm, load_tokenizer
from guided_dropout.provenance import provenance

RESULTS = Path(__file__).parents[1] / "results" / "overhead"
COPIES = ("dropout", "guided", "again")
UPPER = 0.1
WARMUP = 5


def schedule_for(model: str, file: Path | None) -> DropoutSchedule:
    """The schedule in `file`, or one from a quick profile on the embedded text."""
    if file:
        return DropoutSchedule.load(file)
    lm, tokenizer = load_lm(model), load_tokenizer(model)
    samples = corpus.lm_samples(demo_paragraphs(), tokenizer, objective="mlm", num_samples=32, max_length=64)
    return DropoutSchedule.from_profile(estimate_fisher(lm, samples), lm, upper=UPPER)


def stepper(model: PreTrainedModel, batch: dict[str, torch.Tensor], compiled: bool) -> Callable[[], float]:
    """A function that takes one training step and returns its seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, fused=True)
    run = torch.compile(model) if compiled else model
    device = batch["input_ids"].device

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def step() -> float:
        wait()
        start = time.perf_counter()
        run(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wait()
        return time.perf_counter() - start

    return step


def measure(args: argparse.Namespace, schedule: DropoutSchedule, compiled: bool) -> dict[str, Any]:
    """Seconds of a step of each copy, and the ratios."""
    device = torch.device(args.device)
    base = load_classifier(args.model, 2, head_seed=0).to(device).train()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, base.config.vocab_size, (args.batch_size, args.length), generator=generator).to(device)
    labels = torch.arange(args.batch_size, device=device) % 2
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    times: dict[str, list[float]] = {name: [] for name in COPIES}
    with ExitStack() as stack:
        steps = {}
        for name in COPIES:
            model = copy.deepcopy(base)
            rates = schedule if name == "guided" else DropoutSchedule.uniform(model, UPPER)
            stack.enter_context(apply_dropout(model, rates))
            steps[name] = stepper(model, batch, compiled)
            for _ in range(WARMUP):
                steps[name]()
        for order in itertools.islice(itertools.cycle(itertools.permutations(COPIES)), args.steps):
            for name in order:
                times[name].append(steps[name]())
    return {
        "median_seconds": {name: float(np.median(t)) for name, t in times.items()},
        "guided / dropout": _ratio(times["guided"], times["dropout"]),
        "again / dropout": _ratio(times["again"], times["dropout"]),
    }


def _ratio(a: list[float], b: list[float]) -> dict[str, Any]:
    ratios = np.array(a) / np.array(b)
    interval = stats.bootstrap((ratios,), np.median, method="percentile", rng=np.random.default_rng(0))
    low, high = interval.confidence_interval
    return {"median": float(np.median(ratios)), "interval_95": [float(low), float(high)], "rounds": len(ratios)}


def main() -> None:
    """Measure, print, write."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", nargs="?", default="demo")
    p.add_argument("--schedule", type=Path)
    p.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    p.add_argument("--modes", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"])
    p.add_argument("--steps", type=int, default=120, help="rounds that are timed, best a multiple of 6")
    p.add_argument("--batch-size", type=int, default=16)
    p.add_argument("--length", type=int, default=64, help="tokens a text")
    p.add_argument("--out", type=Path, help="result file")
    args = p.parse_args()
    schedule = schedule_for(args.model, args.schedule)
    name = Path(args.model).name
    result: dict[str, Any] = {
        "kind": "overhead",
        "schema": 1,
        "model": name,
        "sites": len(schedule.rates),
        "rates": {"dropout": UPPER, "guided": [min(schedule.rates.values()), max(schedule.rates.values())]},
        "batch": [args.batch_size, args.length],
        "modes": {},
        "provenance": provenance(device=torch.cuda.get_device_name() if args.device == "cuda" else "cpu"),
    }
    for mode in args.modes:
        found = result["modes"][mode] = measure(args, schedule, compiled=mode == "compiled")
        for pair in ("guided / dropout", "again / dropout"):
            low, high = found[pair]["interval_95"]
            print(f"{mode}: {pair} {found[pair]['median']:.4f} [{low:.4f}, {high:.4f}]", flush=True)
    out = args.out or RESULTS / f"{name}-{args.device}.json"
    write_json(out, result)
    print(out)


if __name__ == "__main__":
    main()
