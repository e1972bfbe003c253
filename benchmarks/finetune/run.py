"""How long does a fine-tuning run take here, beside the recipe of transformers' ``run_glue.py`` (recipe.py)?

    python -m benchmarks.finetune.run MODEL --data GLUE

One after the other and in turn, for each task and seed: ``guided-dropout finetune`` and the recipe, each a process of
its own, on the same examples with the same numbers; on a GPU both in the precision that ours takes there, and on one
card. Then the same runs by ``guided-dropout bench run``, in ``--jobs`` processes (``--no-grid`` leaves that out): as
many as there are processors, or four on a card. Metrics are called equal where the interval of their difference lies
within ``--margin``. Written after each run; started again, it measures what is missing. Where metrics
alone are wanted, several processes may share the seeds and a folder: ``--no-grid --share 0/2`` and ``1/2``.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.measure import folder_name
from guided_dropout.artefacts import write_json, write_text
from guided_dropout.bench.folder import Experiment
from guided_dropout.bench.run import processors
from guided_dropout.data.tasks import Examples, get_task, load_task, subset
from guided_dropout.provenance import provenance
from guided_dropout.recipe import Recipe
from guided_dropout.results import RunResult, Seeds
from guided_dropout.stats import HELPS, HURTS, paired_comparison, verdict
from guided_dropout.training import precision_of

RESULTS = Path(__file__).parents[1] / "results"
_JOBS_ON_A_CARD = 4

_VERDICTS = {HELPS: "ours is better", HURTS: "the recipe is better"}


def _csv(path: Path, examples: Examples) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*(f"sentence{i + 1}" for i in range(len(examples.texts[0]))), "label"])
        writer.writerows([*text, int(label)] for text, label in zip(examples.texts, examples.labels, strict=True))
    return path


def _on_one_card() -> dict[str, str]:
    """The environment with one card of several: the recipe would spread its batches over all, ours takes one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    return {**os.environ, **({"CUDA_VISIBLE_DEVICES": visible.split(",")[0]} if torch.cuda.is_available() else {})}


def _timed(command: list[str]) -> float:
    begun = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=_on_one_card())
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return time.perf_counter() - begun


def _pair(args: argparse.Namespace, task: str, seed: int, numbers: list[str]) -> dict[str, Any]:
    """Both ways on the same examples, the order turned about from seed to seed."""
    train, validation = (load_task(get_task(task), args.data, split) for split in ("train", "validation"))
    part = subset(train, args.fraction, Seeds.derive(seed).subset)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files = ["--train", str(_csv(folder / "train.csv", part))]
        files += ["--validation", str(_csv(folder / "validation.csv", validation))]
        theirs = [sys.executable, "-m", "benchmarks.finetune.recipe", "--model", args.model, *files, *numbers]
        theirs += ["--seed", str(seed), "--precision", args.precision, "--out", str(folder / "theirs.json")]
        ours = [sys.executable, "-m", "guided_dropout", "finetune", args.model, "--task", task, "--data", args.data]
        ours += ["--arm", "dropout", "--seed", str(seed), "--train-fraction", str(args.fraction), *numbers]
        ours += ["--precision", args.precision, "--evaluate", "end", "--out", str(folder / "ours")]
        seconds = {}
        for name, command in sorted({"ours": ours, "theirs": theirs}.items(), reverse=bool(seed % 2)):
            seconds[name] = _timed(command)
        result = RunResult.load(folder / "ours")
        metrics = json.loads((folder / "theirs.json").read_text())
    devices = {"ours": result.provenance["device"], "theirs": metrics["device"]}
    if len(set(devices.values())) > 1 or metrics["devices"] > 1:
        sys.exit(
            f"ours ran on {devices['ours']}, the recipe on {metrics['devices']} of {devices['theirs']}; expected one"
        )
    return {
        "task": task,
        "seed": seed,
        "device": devices["ours"],
        "precision": args.precision,
        "seconds": seconds,
        "ratio": seconds["ours"] / seconds["theirs"],
        "metric": result.metric,
        "values": {"ours": result.value, "theirs": metrics[result.metric]},
    }


def _grid(args: argparse.Namespace, tasks: list[str], numbers: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        command = [sys.executable, "-m", "guided_dropout", "bench", "run", "--models", args.model, "--data", args.data]
        command += ["--tasks", ",".join(tasks), "--arms", "dropout", "--fractions", str(args.fraction), *numbers]
        command += ["--seeds", str(args.seeds), "--jobs", str(args.jobs), "--out", str(out)]
        seconds = _timed(command)
        values = {r.key.name: r.result.value for r in Experiment(out).runs() if r.result}
    return {"jobs": args.jobs, "runs": len(values), "seconds": seconds, "values": values}


def _summary(args: argparse.Namespace, pairs: list[dict[str, Any]], grid: dict[str, Any] | None) -> dict[str, Any]:
    total = sum(p["seconds"]["theirs"] for p in pairs)
    tasks = {}
    for task in dict.fromkeys(p["task"] for p in pairs):
        own = [p for p in pairs if p["task"] == task]
        compared = paired_comparison([p["values"]["ours"] for p in own], [p["values"]["theirs"] for p in own])
        tasks[task] = {
            "ratio": statistics.median(p["ratio"] for p in own),
            "metric": own[0]["metric"],
            "mean": {w: statistics.fmean(p["values"][w] for p in own) for w in ("ours", "theirs")},
            "difference_t_interval_95": compared.t_interval,
            "verdict": _VERDICTS.get(found := verdict(compared, margin=args.margin), found),
        }
    hourly = {"runs_per_hour_of_the_recipe": 3600 * len(pairs) / total}
    if grid:
        hourly["runs_per_hour_through_the_grid"] = 3600 * grid["runs"] / grid["seconds"]
        hourly["runs_per_hour_ratio"] = (grid["runs"] / grid["seconds"]) / (len(pairs) / total)
    return {"tasks": tasks, **hourly}


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _results() -> Path:
    """Where a CPU's results are committed, or a card's."""
    if not torch.cuda.is_available():
        return RESULTS / "finetune-speed"
    return RESULTS / "gpu" / folder_name(torch.device("cuda")) / "finetune"


def main() -> None:
    """Measure what is missing, write the summary."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model")
    p.add_argument("--data", required=True, help="GLUE folder")
    p.add_argument("--tasks", default="cola,rte")
    p.add_argument("--fraction", type=float, default=0.1)
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--epochs", type=int, default=3)
    p.add_argument("--learning-rate", type=float, default=5e-5)
    p.add_argument("--margin", type=float, default=0.01)
    p.add_argument("--no-grid", action="store_true")
    p.add_argument("--share", default="0/1")
    p.add_argument("--jobs", type=int, default=_JOBS_ON_A_CARD if torch.cuda.is_available() else processors())
    p.add_argument("--out", type=Path, default=_results())
    args = p.parse_args()
    args.precision = precision_of(Recipe())  # as ours takes
    tasks = args.tasks.split(",")
    numbers = ["--epochs", str(args.epochs), "--batch-size", "16", "--learning-rate", str(args.learning_rate)]
    index, count = map(int, args.share.split("/"))
    for seed in range(args.seeds)[index::count]:
        for task in tasks:
            file = args.out / "pairs" / f"{task}_{seed:03d}.json"
            if not file.exists():
                write_json(file, pair := _pair(args, task, seed, numbers))
                print(pair, flush=True)
    files = [args.out / "pairs" / f"{task}_{seed:03d}.json" for seed in range(args.seeds) for task in tasks]
    if not all(file.exists() for file in files):
        return
    state: dict[str, Any] = {"pairs": [json.loads(file.read_text()) for file in files]}
    if not args.no_grid:
        state["grid"] = _grid(args, tasks, numbers)
    setting = {"model": Path(args.model).name, "fraction": args.fraction, "seeds": args.seeds, "numbers": numbers}
    setting |= {"margin": args.margin, "threads": torch.get_num_threads(), "precision": args.precision}
    summary = _summary(args, state["pairs"], state.get("grid"))
    state |= {"setting": setting, "summary": summary, "provenance": provenance(device=_device())}
    write_json(args.out / "runs.json", state)
    shutil.rmtree(args.out / "pairs")
    write_text(args.out / "README.md", _readme(state))
    print(json.dumps(state["summary"], indent=1))


def _interval(found: tuple[float, float] | None) -> str:
    return f"[{found[0]:+.3f}, {found[1]:+.3f}]" if found else "none: all differences are the same"


def _readme(state: dict[str, Any]) -> str:
    s, setting, where = state["summary"], state["setting"], state["provenance"]
    rows = [
        f"| {task} | {t['ratio']:.2f} | {t['metric']} | {t['mean']['ours']:.3f} | {t['mean']['theirs']:.3f} "
        f"| {_interval(t['difference_t_interval_95'])} | {t['verdict']} |"
        for task, t in s["tasks"].items()
    ]
    lines = [
        "# Time of a fine-tuning run, beside the recipe of transformers' run_glue.py",
        "",
        f"{setting['model']}, {setting['fraction']:g} of the training data, {setting['seeds']} seeds, "
        f"`{' '.join(setting['numbers'])}`, threads: {setting['threads']}; "
        f"{where['device']} in {setting['precision']}, {where['platform']}, torch {where['versions']['torch']}, "
        f"transformers {where['versions']['transformers']}, {where['date'][:10]}. "
        "Made by `python -m benchmarks.finetune.run`.",
        "",
        "| task | time ÷ recipe's, median | metric | ours | recipe | 95 % interval of the difference | "
        f"verdict, margin {setting['margin']:g} |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]
    if "grid" in state:
        through, alone = s["runs_per_hour_through_the_grid"], s["runs_per_hour_of_the_recipe"]
        lines += [
            "",
            f"Through `bench run` in {state['grid']['jobs']} processes: {through:.0f} runs an hour, the recipe "
            f"{alone:.0f}: {s['runs_per_hour_ratio']:.2f} times as many.",
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
