"""Do batches of texts of like lengths cost anything? The runs of ``run.py`` again, with batches drawn at random.

    python -m benchmarks.finetune.batches FOLDER MODEL --data GLUE

FOLDER is what ``run.py`` wrote, of one task: its model, numbers and seeds are taken, and its values beside these.
Written after each run; several at once (``--share 0/2`` and ``--share 1/2``) share the seeds and a folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import guided_dropout.encoding
from guided_dropout.artefacts import write_json
from guided_dropout.bench.stats import paired_comparison
from guided_dropout.finetune import finetune
from guided_dropout.provenance import provenance


def main() -> None:
    """Run what is missing, compare."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path)
    p.add_argument("model")
    p.add_argument("--data", required=True)
    p.add_argument("--share", default="0/1")
    args = p.parse_args()
    index, count = map(int, args.share.split("/"))
    known = json.loads((args.folder / "runs.json").read_text())
    numbers = dict(zip(*[iter(known["setting"]["numbers"])] * 2, strict=True))
    guided_dropout.encoding._BATCHES_TOGETHER = 1  # sorted within a batch alone
    for pair in known["pairs"][index::count]:
        file = args.folder / "random" / f"{pair['seed']:03d}.json"
        if file.exists():
            continue
        with tempfile.TemporaryDirectory() as scratch:
            result = finetune(
                args.model,
                pair["task"],
                data=args.data,
                arm="dropout",
                seed=pair["seed"],
                train_fraction=known["setting"]["fraction"],
                epochs=int(numbers["--epochs"]),
                batch_size=int(numbers["--batch-size"]),
                learning_rate=float(numbers["--learning-rate"]),
                evaluate="end",
                out=Path(scratch) / "run",
            )
        write_json(file, {"seed": pair["seed"], "value": result.value, "seconds": result.times["train"]})
        print(pair["seed"], result.value, flush=True)
    files = sorted((args.folder / "random").glob("*.json"))
    if len(files) == len(known["pairs"]):
        _summary(args.folder, known, [json.loads(f.read_text()) for f in files])


def _summary(folder: Path, known: dict[str, Any], runs: list[dict[str, Any]]) -> None:
    at_random = {run["seed"]: run["value"] for run in runs}
    values = {w: [pair["values"][w] for pair in known["pairs"]] for w in ("ours", "theirs")}
    values["random"] = [at_random[pair["seed"]] for pair in known["pairs"]]
    compared = {}
    for a, b in (("ours", "random"), ("random", "theirs"), ("ours", "theirs")):
        found = paired_comparison(values[a], values[b])
        compared[f"{a} - {b}"] = {"mean": found.mean, "t_interval_95": found.t_interval, "wilcoxon_p": found.wilcoxon_p}
    means = {way: statistics.fmean(v) for way, v in values.items()}
    summary = {"runs": runs, "means": means, "differences": compared, "provenance": provenance()}
    write_json(folder / "batches.json", summary)
    print(json.dumps({"means": means, "differences": compared}, indent=1))


if __name__ == "__main__":
    main()
