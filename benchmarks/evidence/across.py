"""Compare arms of two experiments seed by seed, where these share their recipe and only the schedule differs.

    python -m benchmarks.evidence.across DIR ARM OTHER_DIR OTHER_ARM

For each task: ARM of DIR minus OTHER_ARM of OTHER_DIR, mean and 95 % t interval. Within one experiment `guided-dropout
bench compare` does this.
"""

from __future__ import annotations

import sys
from collections import defaultdict

from guided_dropout.bench.folder import Experiment
from guided_dropout.errors import DataError
from guided_dropout.stats import PairedComparison, paired_comparison


def across(folder: str, arm: str, other: str, other_arm: str) -> dict[tuple[str, float], PairedComparison]:
    """(task, fraction) → differences of the seeds that both have.

    Raises:
        DataError: two runs of one seed that did not start from the same weights, batches and examples, or no seeds.
    """
    there = {
        (r.key.task, r.key.fraction, r.key.seed): r.result
        for r in Experiment(other).runs()
        if r.key.arm == other_arm and r.result
    }
    pairs = defaultdict(list)
    for run in Experiment(folder).runs():
        key = run.key
        mine, its = run.result, there.get((key.task, key.fraction, key.seed))
        if key.arm != arm or mine is None or its is None:
            continue
        if mine.pairing != its.pairing:
            raise DataError(
                f"{key.task}, seed {key.seed}: found {mine.pairing} and {its.pairing}; expected one pairing"
            )
        pairs[key.task, key.fraction].append((mine.value, its.value))
    if not pairs:
        raise DataError(f"{arm} of {folder} and {other_arm} of {other} share no seed; expected one at least")
    return {cell: paired_comparison(*zip(*values, strict=True)) for cell, values in pairs.items()}


if __name__ == "__main__":
    for (task, fraction), found in across(*sys.argv[1:5]).items():
        low, high = found.t_interval or (float("nan"),) * 2
        print(f"{task} {fraction:g}: {found.mean:+.3f} [{low:+.3f}, {high:+.3f}], {found.n} pairs")
