"""Made-up runs, profile and site rows for the tests of figures and reports."""

from typing import Any

import torch

from guided_dropout.fisher import FisherProfile
from guided_dropout.results import RunResult, Seeds


def run(arm: str, seed: int, value: float | None, **changes: Any) -> RunResult:
    facts: dict[str, Any] = {
        "task": "colour",
        "arm": arm,
        "metric": "accuracy",
        "value": value,
        "metrics": {"accuracy": value},
        "history": [],
        "diverged": value is None,
        "collapsed": False,
        "seeds": Seeds.derive(seed),
        "recipe": {"epochs": 2, "batch_size": 8, "learning_rate": 1e-3, "n_train": 64, "n_eval": 32},
        "rates": {"mean": 0.05, "min": 0.0, "max": 0.1, "sites": 3, "shape": "linear"},
        "pairing": {"weights": f"w{seed}", "batches": f"b{seed}"},
        "model": {"name_or_path": "demo"},
        "times": {"total": 1.0},
        "provenance": {"versions": {"torch": "2"}, "python": "3.11"},
    }
    return RunResult(**{**facts, **changes})


def profile() -> FisherProfile:
    generator = torch.Generator().manual_seed(0)
    diagonal = {f"layer.{i}.weight": torch.exp(3 * torch.randn(100, 60, generator=generator) - 12) for i in range(3)}
    diagonal["layer.0.weight"][:20] = 0
    return FisherProfile(
        diagonal=diagonal,
        tensor_means={name: t.double().mean().item() for name, t in diagonal.items()},
        num_samples=32,
        num_skipped=0,
        objective="mlm",
        reduction="mean",
        model={"architecture": "BertForMaskedLM", "num_parameters": 18_000},
    )


def site(path: str, score: float | None, rate: float | None, kind: str = "module") -> dict[str, Any]:
    return {
        "path": path,
        "kind": kind,
        "rate": 0.1,
        "calls": 1,
        "in_head": score is None,
        "parameters": ["weight", "bias"],
        "score": score,
        "scheduled_rate": rate,
    }
