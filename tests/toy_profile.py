"""A made-up profile of three small tensors."""

import torch

from guided_dropout import FisherProfile

NAMES = {"a.weight": (3, 2), "a.bias": (2,), "b.weight": (5,)}


def profile(seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)
    diagonal = {n: torch.exp(4 * torch.randn(shape, generator=generator) - 20) for n, shape in NAMES.items()}
    facts = {
        "diagonal": diagonal,
        "tensor_means": {n: t.double().mean().item() for n, t in diagonal.items()},
        "num_samples": 7 + seed,
        "num_skipped": seed,
        "objective": "mlm",
        "reduction": "mean",
        "model": {"architecture": "Toy", "name_or_path": "someone/toy", "num_parameters": 13},
        "coverage": {"fallback": [], "parameters_by_rule": 1.0},
        "provenance": {"text": "t.txt", "seed": seed},
    }
    return FisherProfile(**{**facts, **changes})


def assert_same(a, b):
    for name in a.__dataclass_fields__.keys() - {"diagonal"}:
        assert getattr(a, name) == getattr(b, name), name
    assert list(a.diagonal) == list(b.diagonal)
    assert all(torch.equal(a.diagonal[n], b.diagonal[n]) for n in a.diagonal)
