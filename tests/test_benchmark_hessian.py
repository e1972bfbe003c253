"""The Hessian's diagonal beside the Fisher's: exact where elements are chosen, unbiased where it is estimated."""

from pathlib import Path

import numpy as np
import pytest
import torch
from families import language_model

from benchmarks.fidelity.hessian import compare_elements, compare_means, draw, exact_elements, hutchinson
from benchmarks.fidelity.report import hessian_section
from guided_dropout.artefacts import read_json
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


def test_chosen_elements_are_exact():
    model = language_model("bert", attn_implementation="eager").double()
    g = torch.Generator().manual_seed(0)
    samples = [{"input_ids": (ids := torch.randint(5, 64, (n,), generator=g)), "labels": ids} for n in (6, 4, 5)]
    objective = detect_objective(model, samples[0])
    chosen = {
        "bert.encoder.layer.0.attention.self.query.weight": [0, 7],
        "bert.encoder.layer.0.intermediate.dense.weight": [5, 40],
        "bert.encoder.layer.1.output.dense.bias": [3],
    }
    found = exact_elements(model, objective, samples, chosen, batch_size=2)
    parameters, step = dict(model.named_parameters()), 1e-4

    def loss():
        with torch.no_grad():
            batches = (objective.collate(model, [s]) for s in samples)
            return sum(objective.losses(model(**b.inputs).logits, b).sum().item() for b in batches) / len(samples)

    for name, places in chosen.items():
        for k, place in enumerate(places):
            values = parameters[name].data.view(-1)
            before, around = values[place].item(), []
            for shift in (-step, 0.0, step):
                values[place] = before + shift
                around.append(loss())
            values[place] = before
            second = (around[0] - 2 * around[1] + around[2]) / step**2
            assert found[name][k] == pytest.approx(second, rel=1e-4, abs=1e-6)


def test_elements_are_drawn_where_the_fisher_is_not_zero_and_compared_by_layer():
    rng = np.random.default_rng(0)
    fisher = {f"m.layer.{k}.fc.{end}": torch.tensor(rng.exponential(size=(30, 20))) for k in range(2) for end in "ab"}
    fisher["m.layer.0.fc.a"][:, :19] = 0
    drawn = draw(fisher, ["m.layer.1.fc.b"], 200, seed=0)
    assert list(drawn) == [("0", "intermediate"), ("1", "intermediate")]
    assert set(drawn["1", "intermediate"]) == {"m.layer.1.fc.a"}
    assert sum(map(len, drawn["0", "intermediate"].values())) == 200
    for members in drawn.values():
        for name, places in members.items():
            assert len(set(places)) == len(places)
            assert (fisher[name].flatten()[places] > 0).all()
    same = {n: fisher[n].flatten().numpy()[places] for members in drawn.values() for n, places in members.items()}
    for row in compare_elements(fisher, same, drawn):
        assert row["parameters"] == 200
        assert row["spearman"] == pytest.approx(1)
        assert row["interval"] == pytest.approx([1, 1])
    opposite = {n: -h for n, h in same.items()}
    for row in compare_elements(fisher, opposite, drawn):
        assert (row["spearman"], row["negative"]) == (pytest.approx(-1), 1)


def test_correlations_of_means_are_bounded_by_the_noise():
    rng = np.random.default_rng(0)
    fisher = {f"m.layer.{k}.fc.weight": torch.tensor(rng.exponential(k + 1, size=(30, 20))) for k in range(40)}
    halves = [{n: t + 30 * torch.tensor(rng.standard_normal(t.shape)) for n, t in fisher.items()} for _ in range(2)]
    found = compare_means(fisher, halves, noise=())
    assert 0.9 < found["between_halves"] < found["ceiling"] < 1
    assert found["spearman"] == pytest.approx(found["ceiling"], abs=0.05)
    assert found["tensors"] == 40


@pytest.mark.parametrize("name", ["demo", "minilm-l6", "smollm2-135m"])
def test_the_committed_readme_tells_the_committed_result(name):
    folder = Path(__file__).parents[1] / f"benchmarks/results/fidelity-{name}"
    found = read_json(folder / "hessian.json", kind="fisher-against-hessian", schema=2)
    assert hessian_section(found) in (folder / "README.md").read_text(encoding="utf-8")
