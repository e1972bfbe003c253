"""What each of several processes does in test_processes.py: prints what happened as one JSON line per process."""

import json
import sys
from pathlib import Path

import torch
from families import language_model
from tiny import save_tiny_bert

from guided_dropout import estimate_fisher, find_sites
from guided_dropout.cli import app as cli
from guided_dropout.fisher.processes import current_processes, leave_processes
from guided_dropout.fisher.ranking import RankingTest
from guided_dropout.fisher.stability import StabilityTest


def draw_samples(lengths, *, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [{"input_ids": (ids := torch.randint(5, 63, (n,), generator=g)), "labels": ids} for n in lengths]


SAMPLES = draw_samples([9, 4, 7, 12, 5, 5, 8, 3, 11, 6, 6, 10, 4, 9, 7])
BAD = {"input_ids": torch.tensor([5, 63, 7]), "labels": torch.tensor([5, 6, 7])}
BLANK = {"input_ids": [5, 6], "labels": [-100, -100]}
# Between the random ones: some without a target, and a process's share of them ends in the middle.
RANDOM = [
    s for i, s in enumerate(draw_samples([9, 4, 7, 12, 5] * 40, seed=4)) for s in ([s, BLANK] if i % 9 == 0 else [s])
]
# In one process the first two stop after an odd number of batches: the second of two processes has one too many.
RULES = {
    "ranked": (RankingTest, {"tolerance": 3.0}, {"batch_size": 6}),
    "stable": (StabilityTest, {"tau": 0.5}, {"batch_size": 4, "scores_only": True}),
    "never": (RankingTest, {"tolerance": 0.0}, {"tokens_per_batch": 40}),
}


def ranked(model, rule, samples=RANDOM, **options):
    """An estimate that a rule of `RULES` ends."""
    sites = {s.path: s.parameters for s in find_sites(model) if not s.in_head}
    kind, settings, how = RULES[rule]
    return estimate_fisher(model, iter(samples), until_ranked=kind(sites, **settings), **how, **options)


class Noting(RankingTest):
    """Keeps one number of each sample that it is told, in that order."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.told = []

    def add(self, means):
        super().add(means)
        self.told += next(iter(means.values())).tolist()


def told(model, **options):
    """What a rule is told by an estimate that it ends."""
    rule = Noting({s.path: s.parameters for s in find_sites(model) if not s.in_head}, tolerance=3.0)
    estimate_fisher(model, iter(RANDOM), until_ranked=rule, batch_size=6, scores_only=True, **options)
    return rule.told


def found(profile):
    """What several processes must find as one does, as plain data."""
    return {
        "means": profile.tensor_means,
        "num": [profile.num_samples, profile.num_skipped],
        "noise": list(profile.noise),
        "nonfinite": profile.coverage.get("nonfinite"),
        "ranking": profile.provenance["ranking"],
    }


def outcome(work):
    """What `work` raised, as text; "done" where it did not."""
    try:
        work()
    except BaseException as e:
        return f"{type(e).__name__} {getattr(e, 'code', None) or e}"
    return "done"


def stop_at(number):
    """A progress function that ends the run after so many samples."""

    def stop(done):
        if done >= number:
            raise RuntimeError("stopped")

    return stop


def with_nan(model):
    with torch.no_grad():
        model.model.embed_tokens.weight[63] = float("nan")
        model.lm_head.weight[63] = 0
    return model


def main(folder: Path) -> None:
    world = current_processes()
    report = {"index": world.index, "count": world.count, "device": str(world.device)}

    model = language_model("gpt2")
    profile = estimate_fisher(model, [*SAMPLES, BLANK], batch_size=2, distributed=True)
    report["means"], report["num"] = profile.tensor_means, [profile.num_samples, profile.num_skipped]
    one = estimate_fisher(model, SAMPLES[:1], distributed=True)  # none for the second process
    report["one"] = one.tensor_means

    nan = with_nan(language_model("llama"))
    spoilt = [*SAMPLES * 4]  # index 1 is the second process's
    spoilt[1] = BAD
    report["nan"] = outcome(lambda: estimate_fisher(nan, spoilt, batch_size=2, distributed=True))
    skipped = estimate_fisher(nan, spoilt, batch_size=2, distributed=True, nonfinite="skip")
    report["skipped"] = [skipped.num_samples, skipped.coverage["nonfinite"]]

    other = language_model("gpt2", seed=world.index)
    report["other"] = outcome(lambda: estimate_fisher(other, SAMPLES, distributed=True))

    kept = {"batch_size": 2, "distributed": True, "checkpoint": folder / "c", "resume": True}

    progress = stop_at(4) if world.index == 1 else None
    report["stopped"] = outcome(
        lambda: estimate_fisher(model, SAMPLES * 4, progress=progress, checkpoint_every=0, **kept)
    )
    files = sorted(f.name for f in (folder / "c").iterdir()) if world.gather(None) else []
    seen = []
    report["resumed"] = estimate_fisher(model, SAMPLES * 4, progress=seen.append, **kept).tensor_means
    report["files"], report["seen"] = files, seen[0]

    bert = language_model("bert")
    report["rules"] = {rule: found(ranked(bert, rule, distributed=True)) for rule in RULES}
    report["told"] = told(bert, distributed=True)
    kept = {"distributed": True, "checkpoint": folder / "r", "resume": True, "checkpoint_every": 1e9}

    def stopped_at(*numbers):
        return outcome(lambda: ranked(bert, "ranked", progress=stop_at(numbers[world.index]), **kept))

    # Process 0 has no state when process 1 has one of four rounds, then one of three; then process 1 goes on to seven.
    report["ranked_stops"] = [stopped_at(1000, 24), stopped_at(18, 1000), stopped_at(1000, 40)]
    report["ranked_resumed"] = found(ranked(bert, "ranked", **kept))
    if world.is_main:
        (folder / "r" / "process-1-of-2.safetensors").unlink()
    world.gather(None)
    report["ranked_lost"] = found(ranked(bert, "ranked", **kept))
    kept["checkpoint"] = folder / "s"
    last = -(-report["rules"]["ranked"]["num"][0] // 12) * 6  # of the main process, by which the rule is settled
    report["ranked_stops"].append(stopped_at(last, 1000))
    report["ranked_settled"] = found(ranked(bert, "ranked", **kept))
    bad = [*RANDOM]
    bad[7] = BAD  # in the second process's first batch
    report["ranked_nan"] = outcome(lambda: ranked(nan, "ranked", bad, distributed=True))
    report["ranked_skipped"] = found(ranked(nan, "ranked", bad, distributed=True, nonfinite="skip"))

    if world.is_main:
        save_tiny_bert(folder / "model")
    world.gather(None)
    sys.argv = [
        "guided-dropout",
        "fisher",
        str(folder / "model"),
        "--text",
        "nowhere.txt",
        "--out",
        str(folder / "out"),
    ]
    report["cli"] = outcome(cli.main)
    (folder / f"report-{world.index}.json").write_text(json.dumps(report))
    leave_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
