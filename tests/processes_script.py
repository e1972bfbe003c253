"""What each of several processes does in test_processes.py: prints what happened as one JSON line per process."""

import json
import sys
from pathlib import Path

import torch
from families import language_model
from tiny import save_tiny_bert

from guided_dropout import cli, estimate_fisher, find_sites
from guided_dropout.fisher.processes import current_processes, leave_processes
from guided_dropout.fisher.ranking import RankingTest


def draw_samples(lengths, *, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [{"input_ids": (ids := torch.randint(5, 63, (n,), generator=g)), "labels": ids} for n in lengths]


SAMPLES = draw_samples([9, 4, 7, 12, 5, 5, 8, 3, 11, 6, 6, 10, 4, 9, 7])
BLANK = {"input_ids": [5, 6], "labels": [-100, -100]}
RANK_TOLERANCE = 3.0


def outcome(work):
    """What `work` raised, as text; "done" where it did not."""
    try:
        work()
    except BaseException as e:
        return f"{type(e).__name__} {getattr(e, 'code', None) or e}"
    return "done"


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
    spoilt[1] = {"input_ids": torch.tensor([5, 63, 7]), "labels": torch.tensor([5, 6, 7])}
    report["nan"] = outcome(lambda: estimate_fisher(nan, spoilt, batch_size=2, distributed=True))
    skipped = estimate_fisher(nan, spoilt, batch_size=2, distributed=True, nonfinite="skip")
    report["skipped"] = [skipped.num_samples, skipped.coverage["nonfinite"]]

    bert = language_model("bert")  # which has noise to be left out
    sites = {s.path: s.parameters for s in find_sites(bert) if not s.in_head}
    test = RankingTest(sites, tolerance=RANK_TOLERANCE)
    ranked = estimate_fisher(bert, SAMPLES * 20, batch_size=2, until_ranked=test, distributed=True)
    report["ranked"] = {"means": ranked.tensor_means, "noise": ranked.noise, **ranked.provenance["ranking"]}

    other = language_model("gpt2", seed=world.index)
    report["other"] = outcome(lambda: estimate_fisher(other, SAMPLES, distributed=True))

    kept = {"batch_size": 2, "distributed": True, "checkpoint": folder / "c", "resume": True}

    def stop(done):
        if done >= 4:
            raise RuntimeError("stopped")

    progress = stop if world.index == 1 else None
    report["stopped"] = outcome(
        lambda: estimate_fisher(model, SAMPLES * 4, progress=progress, checkpoint_every=0, **kept)
    )
    files = sorted(f.name for f in (folder / "c").iterdir()) if world.gather(None) else []
    seen = []
    report["resumed"] = estimate_fisher(model, SAMPLES * 4, progress=seen.append, **kept).tensor_means
    report["files"], report["seen"] = files, seen[0]

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
