"""Choose the learning rate of an experiment on training data alone, with plain dropout alone.

    python benchmarks/evidence/tune.py MODEL --data GLUE --tasks cola,rte --rates 2e-5,5e-5,1e-4 --out FILE

For each task, rate and seed: train on a part of the training data (10 %), evaluate on another part of that size.
Neither the dev split nor an arm under test has a part in it, and the seeds are not among those of the experiment. The
rule: the rate whose metric, averaged over seeds and tasks, is highest. FILE is written after each run; what stands in
it is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from guided_dropout.artefacts import write_json
from guided_dropout.data.examples import subset
from guided_dropout.data.tasks import get_task, load_task
from guided_dropout.finetune import finetune
from guided_dropout.provenance import provenance
from guided_dropout.workbench import Workbench

SEEDS = (1000, 1001)


def main() -> None:
    """Train with each rate, print the means and the choice."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model")
    p.add_argument("--data", required=True, help="GLUE folder")
    p.add_argument("--tasks", default="cola,rte")
    p.add_argument("--rates", default="2e-5,5e-5,1e-4,2e-4")
    p.add_argument("--epochs", type=int, default=5)
    p.add_argument(
        "--fraction", type=float, default=0.1, help="of the training data, to train on; as much to evaluate on"
    )
    p.add_argument("--residual-sites", action="store_true", help="as in bench run")
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args()
    tasks, rates = args.tasks.split(","), [float(r) for r in args.rates.split(",")]
    setting = {
        "model": Path(args.model).name,
        "epochs": args.epochs,
        "fraction": args.fraction,
        "residual_sites": args.residual_sites,
    }
    found: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    made_with = {key: value for key, value in found.get("setting", setting).items() if key != "tasks"}
    if found and made_with != setting:
        sys.exit(f"{args.out} was made with {made_with}, not {setting}: choose another --out")
    found = {"values": found.get("values", {}), "setting": setting}
    bench = Workbench(args.model)
    for seed, task, rate in ((s, t, r) for s in SEEDS for t in tasks for r in rates):
        key = f"{task} {rate:g} {seed}"
        if key in found["values"]:
            continue
        fifth = subset(load_task(get_task(task), args.data, "train"), 2 * args.fraction, seed)
        half = len(fifth) // 2
        pair = fifth.take(range(half)), fifth.take(range(half, len(fifth)))
        result = finetune(
            bench, task, data=pair, arm="dropout", seed=seed, epochs=args.epochs, learning_rate=rate, evaluate="end",
            residual_sites=args.residual_sites,
        )  # fmt: skip
        found["values"][key] = result.value
        write_json(args.out, found)
        print(key, result.value, flush=True)
    means = {
        f"{rate:g}": statistics.fmean(found["values"][f"{t} {rate:g} {s}"] or 0.0 for t in tasks for s in SEEDS)
        for rate in rates
    }
    chosen = max(means, key=means.__getitem__)
    write_json(
        args.out,
        {**found, "setting": {**setting, "tasks": tasks}, "means": means, "chosen": chosen, "provenance": provenance()},
    )
    print(means, "→", chosen)


if __name__ == "__main__":
    main()
