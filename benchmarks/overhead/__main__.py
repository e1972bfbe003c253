"""``python -m benchmarks.overhead``: training steps with guided and with plain dropout, side by side; resumable.

    python -m benchmarks.overhead                       # the embedded model, eager and compiled
    python -m benchmarks.overhead MODEL --schedule FILE --device cuda --rounds 240

One JSON file a model and mode, and a summary. It measures what is missing: rounds that are there stay.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.overhead.measure import CYCLE, Setting, rates_of, rounds, schedule_for
from benchmarks.overhead.summary import KIND, SCHEMA, ratios, summary
from guided_dropout.artefacts import read_json, write_json, write_text
from guided_dropout.identity import weights_digest
from guided_dropout.models import load_classifier
from guided_dropout.provenance import provenance
from guided_dropout.schedule import DropoutSchedule

RESULTS = Path(__file__).resolve().parents[1] / "results" / "overhead"


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.overhead", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("model", nargs="?", default="demo")
    p.add_argument("--schedule", type=Path, help="by default one from a quick profile on the embedded text")
    p.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    p.add_argument("--modes", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"])
    p.add_argument("--rounds", type=int, default=5 * CYCLE, help=f"in all, best a multiple of {CYCLE}")
    p.add_argument("--batch-size", type=int, default=16)
    p.add_argument("--length", type=int, default=64, help="tokens a text")
    p.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    p.add_argument("--summary", action="store_true", help="only write the summary of what there is")
    args = p.parse_args(argv)
    if args.rounds < 2:
        p.error(f"--rounds {args.rounds}; expected at least 2")
    if not args.summary:
        schedule = schedule_for(args.model, args.schedule)
        for mode in args.modes:
            setting = Setting(args.model, mode, args.device, args.batch_size, args.length)
            measure(
                setting, schedule, args.out / f"{Path(args.model).name}-{args.device}" / f"{mode}.json", args.rounds
            )
    write_text(args.out / "README.md", summary(args.out))
    print(args.out / "README.md")


def measure(setting: Setting, schedule: DropoutSchedule, path: Path, wanted: int) -> None:
    """Add rounds to the file until there are as many as `wanted`; it is written after each `CYCLE` of them."""
    facts = _facts(setting, schedule)
    record: dict[str, Any] = {"kind": KIND, "schema": SCHEMA, "setting": facts, "sessions": [], "rounds": []}
    if path.exists():
        record = read_json(path, kind=KIND, schema=SCHEMA)
        _check_same(record["setting"], facts, path)
    if len(record["rounds"]) < wanted:
        session = {"first_round": len(record["rounds"]), "load_before": os.getloadavg()[0], "provenance": provenance()}
        record["sessions"].append(session)
        for seconds in rounds(setting, schedule):
            record["rounds"].append(seconds)
            done = len(record["rounds"])
            if done % CYCLE == 0 or done >= wanted:
                write_json(path, record)
                print(f"{setting.model} {setting.mode}: {done} of {wanted} rounds", flush=True)
            if done >= wanted:
                break
    for name, ratio in ratios(record["rounds"]).items():
        print(f"{setting.model} {setting.mode}: {name} {ratio['median']:.4f} [{ratio['q25']:.4f}, {ratio['q75']:.4f}]")


def _facts(setting: Setting, schedule: DropoutSchedule) -> dict[str, Any]:
    model = load_classifier(setting.model, 2, head_seed=0)
    rates = rates_of(schedule, model)
    return {
        **asdict(setting),
        "model": Path(setting.model).name,
        "weights": weights_digest(dict(model.named_parameters())),
        "sites": len(schedule.rates),
        "rates": {name: [min(s.rates.values()), max(s.rates.values())] for name, s in rates.items()},
        "schedule": list(schedule.rates.values()),
        "processor": _processor(setting.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _check_same(there: Mapping[str, Any], here: Mapping[str, Any], path: Path) -> None:
    odd = [key for key in here if there.get(key) != here[key]]
    if odd:
        sys.exit(
            f"{path} was measured with {odd[0]} {there.get(odd[0])!r}, this is {here[odd[0]]!r}; expected the same: "
            "remove the file, or choose another --out"
        )


def _processor(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    rows = info.read_text().splitlines() if info.exists() else []
    return next((row.split(":", 1)[1].strip() for row in rows if row.startswith("model name")), "unknown processor")


if __name__ == "__main__":
    main()
