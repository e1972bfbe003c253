"""Does guidance help with little data? Paired runs of three arms on CoLA and RTE at 10 % of the training data.

    python benchmarks/glue_low_data/run.py tune MODEL --data GLUE --out DIR   # learning rate, on training data only
    python benchmarks/glue_low_data/run.py run MODEL --data GLUE --schedule FILE --out DIR

``tune`` compares learning rates and epochs with plain dropout alone; it trains on 10 % of a task's training data and
evaluates on another 10 % of it, so that neither the dev split nor the arms under test take part in the choice. ``run``
evaluates on the dev split. Both do only what is missing in DIR. ``run`` ends with ``summary.json`` in DIR.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from guided_dropout.artefacts import write_json
from guided_dropout.bench.stats import paired_comparison, summarise, verdict
from guided_dropout.examples import subset
from guided_dropout.finetune import RunResult, finetune
from guided_dropout.provenance import provenance
from guided_dropout.schedule import DropoutSchedule
from guided_dropout.tasks import get_task, load_task

TASKS = ("cola", "rte")
ARMS = ("dropout", "uniform", "guided")
FRACTION = 0.1
TUNING_SEEDS = (1000,)  # not among the seeds of `run`


def tune(args: argparse.Namespace) -> None:
    """Mean metric of plain dropout for each learning rate and number of epochs."""
    for name, rate, epochs, seed in itertools.product(TASKS, args.rates, args.epochs, TUNING_SEEDS):
        out = args.out / f"{name}-{rate:g}-{epochs}-{seed}"
        if not (out / "result.json").exists():
            train = load_task(get_task(name), args.data, "train")
            fifth = subset(train, 2 * FRACTION, seed)
            half = len(fifth) // 2
            pair = fifth.take(range(half)), fifth.take(range(half, len(fifth)))
            finetune(args.model, name, data=pair, arm="dropout", seed=seed, epochs=epochs, learning_rate=rate, out=out)
        result = RunResult.load(out)
        print(f"{name} lr {rate:g} epochs {epochs} seed {seed}: {result.metric} {result.value}", flush=True)


def run(args: argparse.Namespace) -> None:
    """Each arm with each seed, then the statistics."""
    schedule = DropoutSchedule.load(args.schedule)
    (epochs,), (rate,) = args.epochs, args.rates
    for seed, name, arm in itertools.product(range(args.seeds), TASKS, ARMS):
        out = args.out / f"{name}-{arm}-{seed}"
        if not (out / "result.json").exists():
            finetune(
                args.model, name, data=args.data, arm=arm, schedule=schedule, seed=seed, train_fraction=FRACTION,
                epochs=epochs, learning_rate=rate, out=out,
            )  # fmt: skip
        result = RunResult.load(out)
        print(f"{name} {arm} seed {seed}: {result.metric} {result.value} ({result.times['total']:.0f} s)", flush=True)
    write_json(args.out / "summary.json", summary(args, schedule))


def summary(args: argparse.Namespace, schedule: DropoutSchedule) -> dict[str, object]:
    """Arms, paired differences with intervals, and the verdict that they support."""
    tasks = {}
    for name in TASKS:
        runs = {arm: [RunResult.load(args.out / f"{name}-{arm}-{s}") for s in range(args.seeds)] for arm in ARMS}
        values = {arm: [r.value for r in results] for arm, results in runs.items()}
        comparisons = {}
        for control in ("dropout", "uniform"):
            compared = paired_comparison(values["guided"], values[control])
            comparisons[f"guided - {control}"] = {
                "mean": compared.mean,
                "t_interval_95": compared.t_interval,
                "wilcoxon_p": compared.wilcoxon_p,
                "detectable_difference": compared.detectable,
                "verdict": verdict(compared),
            }
        tasks[name] = {
            "metric": runs["guided"][0].metric,
            "values": values,
            "means": {arm: summarise(v).mean for arm, v in values.items()},
            "collapsed": {arm: sum(r.collapsed for r in results) for arm, results in runs.items()},
            "comparisons": comparisons,
            "recipe": {k: Path(v).name if k.endswith("_data") else v for k, v in runs["guided"][0].recipe.items()},
        }
    return {
        "kind": "glue-low-data",
        "schema": 1,
        "model": Path(args.model).name,
        "seeds": list(range(args.seeds)),
        "schedule": {"mean": schedule.mean_rate, "upper": schedule.upper, "lower": schedule.lower, **schedule.profile},
        "tasks": tasks,
        "provenance": provenance(),
    }


def main() -> None:
    """Arguments in, `tune` or `run`."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["tune", "run"])
    p.add_argument("model")
    p.add_argument("--data", required=True, help="GLUE folder")
    p.add_argument("--schedule", type=Path)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--rates", type=float, nargs="+", default=[5e-5, 1e-4, 2e-4])
    p.add_argument("--epochs", type=int, nargs="+", default=[5])
    p.add_argument("--seeds", type=int, default=5)
    args = p.parse_args()
    {"tune": tune, "run": run}[args.what](args)


if __name__ == "__main__":
    main()
