"""Hutchinson's estimate is unbiased: over all sign vectors it is the exact diagonal of the Hessian."""

import numpy as np
import pytest
import torch
from families import language_model

from benchmarks.fidelity.hessian import compare, hutchinson
from guided_dropout.detection import detect_objective


def test_the_mean_over_vectors_approaches_the_exact_diagonal():
    model = language_model("bert", attn_implementation="eager").double()
    g = torch.Generator().manual_seed(0)
    samples = [{"input_ids": (ids := torch.randint(5, 64, (n,), generator=g)), "labels": ids} for n in (6, 4, 5)]
    objective = detect_objective(model, samples[0])
    name = "bert.encoder.layer.1.output.dense.bias"
    p = dict(model.named_parameters())[name]

    def loss():
        total = 0
        for s in samples:
            batch = objective.collate(model, [s])
            total = total + objective.losses(model(**batch.inputs).logits, batch).sum()
        return total / len(samples)

    (gradient,) = torch.autograd.grad(loss(), [p], create_graph=True)
    exact = [torch.autograd.grad(gradient[i], [p], retain_graph=True)[0][i].item() for i in range(len(p))]
    drawn = [found[name] for found in hutchinson(model, objective, samples, vectors=60, seed=1, batch_size=2)]
    mean, error = torch.stack(drawn).mean(0), torch.stack(drawn).std(0) / 60**0.5
    assert (torch.abs(mean - torch.tensor(exact)) < 4 * error + 1e-12).all()
    assert error.max() < 1


def test_correlations_are_by_layer_and_bounded_by_the_noise():
    rng = np.random.default_rng(0)
    fisher = {f"m.layer.{k}.fc.weight": torch.tensor(rng.exponential(size=(30, 20))) for k in range(2)}
    halves = [{n: t + 0.1 * torch.tensor(rng.standard_normal(t.shape)) for n, t in fisher.items()} for _ in range(2)]
    found = compare(fisher, halves, noise=())
    assert [(row["layer"], row["kind"]) for row in found["by_layer"]] == [("0", "intermediate"), ("1", "intermediate")]
    for row in found["by_layer"]:
        assert row["parameters"] == 600
        assert 0.9 < row["between_halves"] < row["ceiling"] < 1
        assert row["spearman"] == pytest.approx(row["ceiling"], abs=0.05)
