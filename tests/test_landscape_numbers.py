"""Curvature, sharpness and comparisons against plain computations in float64."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import language_model
from landscapes import bowl
from scipy import stats
from test_landscape import LINE, SAMPLES
from transformers import BertConfig, BertForMaskedLM

from guided_dropout.cli.landscape_tables import number_text
from guided_dropout.errors import DataError
from guided_dropout.landscape import gaussian_direction, hessian_directions, loss_landscape
from guided_dropout.landscape.compare import as_json, differences, numbers
from guided_dropout.landscape.curvature import hessian_vector_product, second_difference
from guided_dropout.landscape.directions import movable_parameters
from guided_dropout.landscape.losses import Evaluation


def smallest():
    """Few enough parameters for a dense Hessian."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=4,
        max_position_embeddings=12, type_vocab_size=1,
    )  # fmt: skip
    return BertForMaskedLM(config).double()


def gradient(model, evaluation, names):
    loss = sum(evaluation.total(batch) for batch in evaluation.batches) / evaluation.num_samples
    found = torch.autograd.grad(
        loss, [model.get_parameter(n) for n in names], allow_unused=True, materialize_grads=True
    )
    return torch.cat([g.flatten() for g in found])


def test_in_half_precision_products_of_many_batches_add_up():
    """A running sum in bfloat16 stops growing after 256 of the same."""
    model = language_model("bert").bfloat16().eval()
    generator = torch.Generator().manual_seed(0)
    vector = {n: torch.randn(p.shape, generator=generator).to(p) for n, p in movable_parameters(model).items()}
    once, often = (hessian_vector_product(Evaluation(model, SAMPLES[:1] * n, batch_size=1), vector) for n in (1, 600))
    for name, found in often.items():
        torch.testing.assert_close(found, once[name], rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize(("family", "tolerance"), [("bert", 1e-5), ("gpt2", 1e-5), ("t5", 1e-3), ("llama", 1e-3)])
def test_hessian_vector_products_are_differences_of_gradients(family, tolerance):
    """T5 and Llama normalise in float32, whatever the weights."""
    model = language_model(family).double().eval()
    evaluation = Evaluation(model, SAMPLES, batch_size=3)
    names = list(movable_parameters(model))
    generator = torch.Generator().manual_seed(0)
    vector = {n: torch.randn(p.shape, generator=generator).to(p) for n, p in movable_parameters(model).items()}
    found = hessian_vector_product(evaluation, vector)
    step, sides = 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            for n in names:
                model.get_parameter(n).add_(vector[n], alpha=sign * step)
        sides.append(gradient(model, evaluation, names))
        with torch.no_grad():
            for n in names:
                model.get_parameter(n).sub_(vector[n], alpha=sign * step)
    expected = (sides[0] - sides[1]) / (2 * step)
    flat = torch.cat([found[n].flatten() for n in names])
    assert (flat - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("vectors", ["held", "moved"])
def test_the_curvature_along_a_direction_is_that_of_the_hessian(vectors):
    model = language_model("bert").double()
    found = loss_landscape(model, SAMPLES, dims=2, points=3, radius=0.5, vectors=vectors, seeds=(0, 1))
    evaluation = Evaluation(model, SAMPLES)
    for axis in (0, 1):
        curvature, bound = found.curvatures(axis=axis)
        for i, seed in enumerate(found.seeds):
            direction = gaussian_direction(model, seed=seed, axis=axis, vectors=vectors)
            product = hessian_vector_product(evaluation, direction.tensors)
            exact = sum((direction.tensors[n] * t).sum() for n, t in product.items()).item()
            assert curvature[i] == pytest.approx(exact, rel=1e-4)
            assert abs(curvature[i] - exact) <= bound[i]


def test_in_float32_the_curvature_is_right_to_a_few_percent():
    exact = loss_landscape(language_model("bert").double(), SAMPLES, **LINE).curvatures()[0]
    assert loss_landscape(language_model("bert"), SAMPLES, **LINE).curvatures()[0] == pytest.approx(exact, rel=0.05)


def test_second_differences():
    xs = np.array([-2, -1, 0, 1, 2]) * 0.1
    better, bound = second_difference((7 + 3 * xs**4 + 5 * xs**2 + xs).tolist(), 0.1)
    assert better == pytest.approx(10)
    assert bound == pytest.approx(6 * 0.01)


@pytest.mark.parametrize("vectors", ["held", "moved"])
def test_the_sharpest_directions_are_those_of_the_dense_hessian(vectors):
    model = smallest()
    evaluation = Evaluation(model, SAMPLES)
    names = [n for n, p in movable_parameters(model).items() if vectors == "moved" or p.dim() > 1]
    sizes = [model.get_parameter(n).numel() for n in names]
    columns = []
    for i in range(sum(sizes)):
        unit = torch.zeros(sum(sizes), dtype=torch.float64)
        unit[i] = 1
        parts = dict(zip(names, unit.split(sizes), strict=True))
        vector = {n: t.view_as(model.get_parameter(n)) for n, t in parts.items()}
        columns.append(torch.cat([t.flatten() for t in hessian_vector_product(evaluation, vector).values()]))
    values, dense = torch.linalg.eigh(torch.stack(columns))
    assert (torch.stack(columns) - torch.stack(columns).T).abs().max() < 1e-10
    directions, found = hessian_directions(evaluation, vectors=vectors, tolerance=1e-9)
    assert found == pytest.approx(values[[-1, -2]].tolist(), rel=1e-6)
    for direction, vector in zip(directions, dense.T[[-1, -2]], strict=True):
        own = torch.cat([direction.tensors[n].flatten() for n in names])
        assert direction.norm == pytest.approx(1)
        assert abs(own @ vector).item() == pytest.approx(1, abs=1e-5)
    along = loss_landscape(model, SAMPLES, directions="hessian", vectors=vectors, dims=1, points=3, radius=0.05)
    assert along.curvatures()[0] == pytest.approx(found[:1], rel=1e-2)
    assert along.kept.keys() == {(0, 0)}
    assert along.directions["axes"][0]["eigenvalue"] == pytest.approx(found[0], rel=1e-2)


def test_eigenvectors_are_found_once_for_a_run_that_goes_on(tmp_path, monkeypatch):
    class StopError(Exception):
        pass

    def stop(done, total):
        raise StopError

    options = {"directions": "hessian", "dims": 1, "points": 3, "checkpoint": tmp_path / "state"}
    with pytest.raises(StopError):
        loss_landscape(smallest(), SAMPLES, **options, progress=stop)
    whole = loss_landscape(smallest(), SAMPLES, **{**options, "checkpoint": None})
    monkeypatch.setattr("guided_dropout.landscape.rays.hessian_directions", None)
    assert (loss_landscape(smallest(), SAMPLES, **options, resume=True).losses == whole.losses).all()


# Of a landscape that is known: a bowl for each mask


def test_numbers_of_a_bowl():
    curvatures = {"all": 2.0, "top:0.5": 8.0, "random:0.5": 4.0}
    for dims in (1, 2):
        found = bowl(curvatures, dims=dims, lengths=3.0)
        for name, c in curvatures.items():
            mean, most = found.rises(name)
            assert mean == pytest.approx([c / 2] * 5, rel=0.3)
            assert (most >= mean - 1e-12).all()
            assert found.curvatures(name)[0] == pytest.approx(found.rises(name)[0] * 2, rel=1e-6)
            assert found.rises(name, 0.5)[0] == pytest.approx(mean / 4)
        by = {(n.mask, n.measure): n for n in numbers(found)}
        assert by["all", "curvature per length²"].summary.mean == pytest.approx(
            by["all", "curvature"].summary.mean / 9
        )  # fmt: skip


@pytest.mark.parametrize("points", [7, 9])
def test_half_the_radius_has_its_rise_whether_or_not_it_is_a_step(points):
    found = bowl({"all": 2.0}, dims=1, points=points)
    by = {n.measure: n.values for n in numbers(found)}
    assert by["rise at 0.5"] == pytest.approx([rise / 4 for rise in by["rise at 1"]])


def test_all_numbers_are_json_also_where_the_weights_have_no_finite_loss():
    assert as_json(bowl({"all": 2.0}))["origin_loss"] == 4.0
    found = as_json(bowl({"all": 2.0}, origin=np.nan))
    assert found["origin_loss"] is None
    json.dumps(found, allow_nan=False)


def test_intervals_and_verdicts_are_paired_by_seed():
    found = bowl({"all": 2.0, "top:0.5": 8.0, "random:0.5": 4.0, "bottom:0.5": 4.0, "top:0.1": 1.0, "top:0.5=": 3.0})
    by = {(d.first, d.second, d.measure): d for d in differences(found)}
    assert {(a, b) for a, b, _ in by} == {
        ("top:0.5", "random:0.5"), ("top:0.5", "bottom:0.5"), ("bottom:0.5", "random:0.5")
    }  # fmt: skip
    d = by["top:0.5", "random:0.5", "rise at 1"]
    expected = found.rises("top:0.5")[0] - found.rises("random:0.5")[0]
    assert d.comparison.differences == pytest.approx(expected)
    half = stats.t.ppf(0.975, 4) * stats.sem(expected)
    assert d.comparison.t_interval == pytest.approx((expected.mean() - half, expected.mean() + half))
    assert d.verdict == "more"
    assert by["top:0.5", "random:0.5", "area below +1"].verdict == "less"
    assert by["bottom:0.5", "random:0.5", "rise at 1"].verdict == "undecided at this n"
    facts = as_json(found)
    assert len(facts["masks"]) == 6
    assert len(facts["differences"]) == len(by)


def test_what_is_not_finite_has_no_interval():
    found = bowl({"all": 2.0, "top:0.5": np.inf, "random:0.5": 8.0})
    by = {(n.mask, n.measure): n for n in numbers(found)}
    assert by["top:0.5", "rise at 1"].summary is None
    assert by["top:0.5", "rise at 1"].values == (None,) * 5
    assert by["all", "rise at 1"].summary is not None
    assert {d.measure for d in differences(found)} == {"area below +1"}


def bent(points, curvature=14.7, scale=4.0):
    """A line like those of real models: a bowl near the weights, and level far from them."""
    found = bowl({"all": 0.0}, dims=1, points=points, seeds=3)
    rise = scale * (1 - np.exp(-curvature / 2 / scale * found.grid.coordinates[:, 0] ** 2))
    return replace(found, losses=np.broadcast_to(4.0 + rise, found.losses.shape).copy())


def test_the_length_below_a_level_is_right_or_not_told():
    exact = 2 * np.sqrt(-np.log(1 - 1 / 4.0) * 2 * 4.0 / 14.7)
    for points in (9, 13, 25, 65):
        assert bent(points).areas("all")[0] == pytest.approx([exact] * 3, rel=0.02)
        (area,) = [n for n in numbers(bent(points)) if n.measure == "area below +1"]
        assert (area.why_not, area.at_least) == (None, False)
        assert area.summary.mean == pytest.approx(exact, rel=0.02)
    (area,) = [n for n in numbers(bent(5, curvature=40.0)) if n.measure == "area below +1"]
    assert (area.why_not, area.summary) == ("not resolved", None)
    assert abs(area.values[0] - exact * np.sqrt(14.7 / 40)) < area.errors[0]


def test_an_area_that_meets_the_edge_is_a_lower_bound_and_is_not_compared():
    found = bowl({"all": 8.0, "top:0.5": 8.0, "random:0.5": 1.0, "bottom:0.5": 1.5})
    by = {(n.mask, n.measure): n for n in numbers(found)}
    assert by["random:0.5", "area below +1"].at_least
    assert not by["top:0.5", "area below +1"].at_least
    assert number_text(by["random:0.5", "area below +1"]).startswith("≥ ")
    assert not any(d.measure == "area below +1" for d in differences(found))
    assert as_json(found)["masks"][2]["numbers"]["area below +1"]["at_least"] is True


def test_a_step_and_the_same_stretched_have_the_curvature_of_whichever_shows_it_better():
    found = bowl({"all": 2.0, "top:0.5": 1e-4, "top:0.5=": 1e-2}, dims=1)
    lengths = found.lengths.copy()
    lengths[2] *= 10
    noisy, rng = found.losses.copy(), np.random.default_rng(0)
    noisy[1:] += 1e-8 * rng.standard_normal(noisy[1:].shape)  # as rounding would, of both the same
    by = {(n.mask, n.measure): n for n in numbers(replace(found, losses=noisy, lengths=lengths))}
    short, long = (by[name, "curvature per length²"] for name in ("top:0.5", "top:0.5="))
    assert short.values == long.values
    assert short.values == pytest.approx([1e-4] * 5, rel=0.15)
    assert by["top:0.5", "curvature"].values == pytest.approx(short.values)
    assert by["top:0.5=", "curvature"].values == pytest.approx([100 * v for v in long.values])


def test_a_curvature_that_rounding_hides_is_not_told():
    found = bowl({"all": 2.0, "top:0.5": 1e-7, "random:0.5": 1e-7}, dims=1)
    noisy = found.losses + 1e-6 * np.random.default_rng(0).standard_normal(found.losses.shape)
    found = replace(found, losses=noisy)
    by = {(n.mask, n.measure): n for n in numbers(found)}
    assert by["all", "curvature"].why_not is None
    assert by["top:0.5", "curvature"].why_not == "not resolved"
    assert {d.measure for d in differences(found)}.isdisjoint({"curvature", "curvature per length²"})


def test_unknown_masks_seeds_and_radii_are_told():
    found = bowl({"all": 2.0, "top:0.5": 8.0})
    with pytest.raises(DataError, match=r"unknown mask 'top:0\.4'"):
        found.surface("top:0.4")
    with pytest.raises(DataError, match="seed 9; expected one of 0, 1, 2, 3, 4"):
        found.surface("all", 9)
    with pytest.raises(DataError, match=r"no points at radius 0.3; expected one of 0.5, 1"):
        found.rises("all", 0.3)
