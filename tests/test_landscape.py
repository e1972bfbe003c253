"""Losses on lines and planes against models whose weights are set by hand, and nothing left behind."""

import copy
import math
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from families import classifier_of, language_model, objective_of
from hypothesis import example, given, settings
from hypothesis import strategies as st
from landscapes import drawn_profile

from guided_dropout.artefacts import write_json
from guided_dropout.errors import ArtefactError, DataError, ModelError
from guided_dropout.fisher.processes import ProcessError, Processes
from guided_dropout.landscape import Direction, Landscape, Mask, gaussian_direction, loss_landscape, measure
from guided_dropout.landscape.grid import Grid
from guided_dropout.landscape.level import area_below
from guided_dropout.landscape.losses import Evaluation
from guided_dropout.landscape.record import holds_points, remove_record
from guided_dropout.landscape.weights import walking


def draw_samples(lengths, *, masked=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    samples = []
    for n in lengths:
        ids = torch.randint(5, 63, (n,), generator=g)
        labels = ids.clone()
        if masked:
            labels[torch.rand(n, generator=g) > 0.3] = -100
            labels[0] = ids[0]
        samples.append({"input_ids": ids, "labels": labels})
    return samples


SAMPLES = draw_samples([9, 4, 7, 12, 5, 5, 8], masked=True)
LINE = {"dims": 1, "points": 5, "radius": 0.8}


def slow_losses(model, samples, directions, coordinates):
    """A copy of the model for each point, a sample at a time, the model's own loss (which it takes in float32)."""
    found = []
    for point in coordinates:
        moved = copy.deepcopy(model).eval()
        own = dict(moved.named_parameters())
        with torch.no_grad():
            for step, direction in zip(point, directions, strict=True):
                for name, t in direction.tensors.items():
                    own[name] += step * t.to(own[name].dtype)
            losses = [
                moved(input_ids=s["input_ids"][None], labels=torch.as_tensor(s["labels"])[None]).loss.item()
                for s in samples
            ]
        found.append(math.fsum(losses) / len(losses))
    return found


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "albert", "llama", "modernbert", "bart"])
def test_losses_are_those_of_weights_set_by_hand(family):
    model = language_model(family).double()
    samples = draw_samples([9, 4, 7, 6], masked=objective_of(family) == "mlm")
    found = loss_landscape(model, samples, dims=2, points=3, radius=0.7, vectors="moved", batch_size=3)
    directions = [gaussian_direction(model, axis=axis, vectors="moved") for axis in (0, 1)]
    some = [0, 3, 4, 5, 8, 11, 40]
    expected = slow_losses(model, samples, directions, found.grid.coordinates[some])
    assert found.losses[0, 0, some] == pytest.approx(np.array(expected), rel=1e-6)
    assert (found.objective, found.num_samples) == (objective_of(family), 4)
    assert found.lengths[0, 0] == pytest.approx([d.norm for d in directions])


def test_a_classifier_is_measured_too():
    model = classifier_of("bert").double()
    samples = [{"input_ids": s["input_ids"], "labels": i % 2} for i, s in enumerate(SAMPLES)]
    found = loss_landscape(model, samples, **LINE)
    expected = slow_losses(model, samples, [gaussian_direction(model)], found.grid.coordinates)
    assert found.losses[0, 0] == pytest.approx(np.array(expected), rel=1e-6)


def test_batches_padding_and_the_heads_shortcut_change_nothing():
    model = language_model("bert").double()
    ways = [{"batch_size": 1}, {"batch_size": 7}, {"tokens_per_batch": 20}]
    one, *others = [loss_landscape(model, SAMPLES, **LINE, **way) for way in ways]
    for other in others:
        assert other.losses == pytest.approx(one.losses, rel=1e-12)
    assert one.provenance["head_at_targets"]
    full = draw_samples([9, 4, 7])
    assert not loss_landscape(model, full, **LINE).provenance["head_at_targets"]  # nothing to save
    assert Evaluation(model, SAMPLES).head_at_targets


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_weights_at_a_point_are_rounded_once(dtype):
    model = language_model("bert").to(dtype)
    directions = [gaussian_direction(model, axis=axis) for axis in (0, 1)]
    name = "bert.encoder.layer.0.output.dense.weight"
    origin = model.get_parameter(name).detach().clone()
    wide = torch.promote_types(dtype, torch.float32)
    with walking(model, directions) as walker:
        for alpha, beta in ((0.0, 0.3), (0.5, 0.3), (-0.25, 0.3), (0.5, -1.0), (0.0, 0.0)):
            walker.move(alpha, beta)
            expected = origin.to(wide) + beta * directions[1].tensors[name] + alpha * directions[0].tensors[name]
            assert model.get_parameter(name).dtype == dtype
            bound = torch.finfo(dtype).eps * 2
            assert torch.allclose(model.get_parameter(name).double(), expected.double(), rtol=bound, atol=bound / 8)
    assert torch.equal(model.get_parameter(name), origin)


def state_of(model):
    return (
        {n: (p.detach().clone(), p.requires_grad, p._version) for n, p in model.named_parameters()},
        [m.training for m in model.modules()],
        model.config.use_cache if hasattr(model.config, "use_cache") else None,
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
    )


@pytest.mark.parametrize("how", ["whole", "stopped"])
def test_the_model_comes_back_bit_for_bit(how):
    model = language_model("gpt2").train()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0] = -0.0
    model.transformer.wte.weight.requires_grad_(False)
    loss = model(input_ids=SAMPLES[0]["input_ids"][None]).logits.sum()  # a graph that is still to go backward
    before = state_of(model)

    def progress(done, total):
        assert model.training is False
        if how == "stopped" and done == 3:
            raise KeyboardInterrupt

    if how == "stopped":
        with pytest.raises(KeyboardInterrupt):
            loss_landscape(model, SAMPLES, points=3, progress=progress)
    else:
        loss_landscape(model, SAMPLES, points=3, progress=progress)
    after = state_of(model)
    for (a, *others), (b, *same) in zip(before[0].values(), after[0].values(), strict=True):
        assert torch.equal(a.view(torch.int32), b.view(torch.int32))
        assert others == same
    assert before[1:] == after[1:]
    loss.backward()


def test_masks_and_seeds_share_directions():
    model, names = language_model("bert").double(), ["all", "top:0.5", "bottom:0.5", "random:0.5", "top:0.5="]
    profile = drawn_profile(model)
    found = loss_landscape(model, SAMPLES, masks=names, profile=profile, seeds=(4, 7), **LINE)
    assert found.losses.shape == (5, 2, len(found.grid.coordinates))
    drawn = gaussian_direction(model, seed=4).tensors.values()
    assert found.moved[0, 0] == sum(int((t != 0).sum()) for t in drawn)
    chosen = sum(t.numel() for t in drawn) / 2
    padding = model.config.hidden_size  # whose embedding is zero, so that it does not move
    assert found.moved[1:] == pytest.approx(np.full((4, 2), chosen), abs=padding)
    full, top, bottom, _, equal = found.lengths[:, :, 0]
    assert top**2 + bottom**2 == pytest.approx(full**2)
    assert equal == pytest.approx(full)
    origins = found.losses[:, :, found.grid.origin]
    assert (origins == origins[0, 0]).all()
    alone = loss_landscape(model, SAMPLES, masks=["top:0.5"], profile=profile, seeds=[7], **LINE)
    assert (alone.losses[0, 0] == found.losses[1, 1]).all()


def test_given_directions_and_those_that_lack():
    model = language_model("bert").double()
    name = "bert.encoder.layer.0.output.dense.weight"
    mine = Direction({name: torch.ones_like(model.get_parameter(name))}, {"kind": "mine"})
    found = loss_landscape(model, SAMPLES, directions=[mine], dims=2, points=3)
    expected = slow_losses(model, SAMPLES, [mine, gaussian_direction(model, axis=1)], found.grid.coordinates[:9])
    assert found.losses[0, 0, :9] == pytest.approx(np.array(expected), rel=1e-6)
    assert found.directions["kind"] == "mine, gaussian"
    with pytest.raises(ModelError, match=r"a direction moves nothing of shape \[1\]; expected a parameter"):
        loss_landscape(model, SAMPLES, directions=[Direction({"nothing": torch.ones(1)})], **LINE)
    with pytest.raises(DataError, match="2 seeds, and neither directions nor masks that are drawn"):
        loss_landscape(model, SAMPLES, directions=[mine], seeds=(0, 1), **LINE)


def test_losses_that_are_not_finite_stay_in(tmp_path):
    model = language_model("bert").half()
    found = loss_landscape(model, SAMPLES, dims=1, points=3, radius=1e5)
    assert not np.isfinite(found.losses[0, 0, 0])
    assert np.isfinite(found.origin_loss)
    again = Landscape.from_pretrained(found.save_pretrained(tmp_path / "l"))
    assert np.array_equal(again.losses, found.losses, equal_nan=True)


# Points


def test_the_origin_is_a_point_and_no_point_stands_twice():
    for dims in (1, 2):
        grid = Grid(dims, 9, 1.5)
        assert grid.steps[4] == 0
        assert (grid.steps == -grid.steps[::-1]).all()
        assert grid.coordinates[grid.origin].tolist() == [0] * dims
        assert len({tuple(p) for p in grid.coordinates.tolist()}) == len(grid.coordinates)
        for radius in grid.radii:
            on = grid.coordinates[grid.on_circle(radius)]
            assert np.linalg.norm(on, axis=1) == pytest.approx(radius)
            assert on.sum(0) == pytest.approx([0] * dims, abs=1e-9)
        for axis in range(dims):
            five = grid.coordinates[grid.stencil(axis)]
            assert five[:, axis] == pytest.approx([-0.06, -0.03, 0, 0.03, 0.06])
    assert len(Grid(2, 9, 1.5).on_circle(0.75)) == 16


@given(st.sampled_from([1, 2]), st.sampled_from([3, 7, 9, 25, 51]), st.floats(1e-6, 1e6))
@example(1, 9, 16.129813270583)
@example(2, 9, 12345.678)
@settings(deadline=None, max_examples=30)
def test_no_two_points_lie_a_digit_apart(dims, points, radius):
    """At such a pair an area's curve would be as steep as rounding makes it."""
    coordinates = Grid(dims, points, radius).coordinates
    assert len(coordinates) == len(Grid(dims, points, 1.0).coordinates)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ((2, 16, 1.5), "16 points along an axis; expected an odd number, .*: 15 or 17"),
        ((1, 1, 1.0), "1 points along an axis; expected an odd number, .*: 3"),
        ((3, 5, 1.0), "3 dimensions; expected 1"),
        ((1, 5, 0.0), "radius 0.0; expected a number above 0"),
        ((1, 5, math.inf), "radius inf; expected a number above 0"),
        ((1, 5, math.nan), "radius nan; expected a number above 0"),
        ((1, 5, 1e200), "radius 1e.200; expected a number above 0 and at most 1e.06"),
    ],
)
def test_points_that_make_no_grid_are_told(grid, message):
    with pytest.raises(DataError, match=message):
        Grid(*grid)


def test_areas_below_a_level():
    steps = np.linspace(-1, 1, 41)
    bowl = steps[:, None] ** 2 + steps[None, :] ** 2
    assert area_below(bowl, steps, 0.25) == (pytest.approx(math.pi / 4, rel=0.01), False)
    area, edge = area_below(bowl, steps, 1.1)
    assert edge
    assert area < 4
    assert area_below(np.abs(steps), steps, 0.33) == (pytest.approx(0.66), False)
    assert area_below(np.full((5, 5), 2.0), np.linspace(-1, 1, 5), 3) == (4.0, True)
    spoilt = bowl.copy()
    spoilt[0, 0], spoilt[1, 1] = np.nan, np.inf
    assert area_below(spoilt, steps, 0.25)[0] == pytest.approx(math.pi / 4, rel=0.01)
    assert area_below(np.array([1.0, np.inf, 1.0]), np.array([-1.0, 0, 1]), 2) == (0.0, True)


# Going on


class StopError(Exception):
    pass


@pytest.mark.parametrize("dims", [1, 2])
def test_a_stopped_run_goes_on_to_the_same_landscape(dims, tmp_path):
    model, folder = language_model("bert"), tmp_path / "state"
    options = {"dims": dims, "points": 3, "seeds": (0, 1), "masks": ["all", "random:0.5"], "checkpoint": folder}
    whole = loss_landscape(model, SAMPLES, **{**options, "checkpoint": None})
    todo = []

    def stop(done, total):
        todo.append(total)
        if done == 5:
            raise StopError

    with pytest.raises(StopError):
        loss_landscape(model, SAMPLES, **options, progress=stop)
    with pytest.raises(ArtefactError, match=r"an unfinished run \(5 points\); .*--resume .*--no-resume"):
        loss_landscape(model, SAMPLES, **options)
    with pytest.raises(StopError):
        loss_landscape(model, SAMPLES, **options, resume=True, progress=stop)
    assert todo[0] - todo[-1] == 5
    found = loss_landscape(model, SAMPLES, **options, resume=True)
    assert (found.losses == whole.losses).all()
    assert (found.lengths == whole.lengths).all()
    assert (found.moved == whole.moved).all()
    assert holds_points(folder)
    remove_record(folder)
    assert not folder.exists()


@dataclass(frozen=True)
class Thread(Processes):
    """One of several processes, which are threads here; `values` is what they hand each other at the `barrier`."""

    barrier: threading.Barrier = field(kw_only=True)
    values: list = field(kw_only=True)

    def gather(self, value):
        self.values[self.index] = copy.deepcopy(value)
        self.barrier.wait()
        found = copy.deepcopy(self.values)
        self.barrier.wait()
        return found

    def sum(self, value):
        return torch.stack(self.gather(value)).sum(0)


def in_threads(count, work, monkeypatch):
    """What `work(index)` returns, or the error that it raises, for each of `count` processes."""
    shared = {"barrier": threading.Barrier(count, timeout=60), "values": [None] * count}
    own = threading.local()
    monkeypatch.setattr(measure, "current_processes", lambda: own.world)

    def one(index):
        own.world = Thread(index, count, torch.device("cpu"), **shared)
        try:
            return work(index)
        except (StopError, ProcessError) as e:
            return e

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


@pytest.mark.parametrize("stopped", [0, 1])
def test_processes_that_do_not_see_each_others_files_go_on_to_the_same_landscape(stopped, tmp_path, monkeypatch):
    """Each on a disk of its own, as on two machines; the next time the points are dealt out in another way."""
    options = {**LINE, "seeds": (0, 1), "masks": ["all", "random:0.5"]}
    whole = loss_landscape(language_model("bert"), SAMPLES, **options)
    models = [language_model("bert") for _ in range(2)]

    def measured(index, progress=None):
        kept = {"checkpoint": tmp_path / f"disk-{index}", "resume": True, "distributed": True}
        return loss_landscape(models[index], SAMPLES, **options, **kept, progress=progress)

    def stop(done, total):
        if done == 5:
            raise StopError

    ended = in_threads(2, lambda index: measured(index, stop if index == stopped else None), monkeypatch)
    assert isinstance(ended[stopped], StopError)
    assert isinstance(ended[1 - stopped], ProcessError)
    for found in in_threads(2, measured, monkeypatch):
        assert (found.losses == whole.losses).all()
        assert (found.lengths == whole.lengths).all()
        assert (found.moved == whole.moved).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"radius": 0.5}, "grid.radius was 0.8, is 0.5"),
        ({"seeds": [3]}, r"seeds was \[0\], is \[3\]"),
        ({"vectors": "moved"}, 'directions.vectors was "held", is "moved"'),
        ({"samples": SAMPLES[1:]}, "samples was"),
        ({"model": 1}, "weights was"),
    ],
)
def test_another_run_is_refused(change, message, tmp_path):
    def stop(done, total):
        raise StopError

    options = {**LINE, "checkpoint": tmp_path / "state"}
    with pytest.raises(StopError):
        loss_landscape(language_model("bert"), SAMPLES, **options, progress=stop)
    model = language_model("bert", seed=change.pop("model", 0))
    samples = change.pop("samples", SAMPLES)
    with pytest.raises(ArtefactError, match=message):
        loss_landscape(model, samples, **{**options, **change}, resume=True)
    assert loss_landscape(model, samples, **{**options, **change}, resume=False)


# The artefact


def test_saved_landscapes_come_back(tmp_path):
    model = language_model("bert")
    options = {"masks": ["all", "random:0.5="], "seeds": (0, 1), "facts": {"text": "t.txt"}, "keep_directions": True}
    made = loss_landscape(model, SAMPLES, **LINE, **options)
    found = Landscape.from_pretrained(made.save_pretrained(tmp_path / "l"), directions=True)
    for name in ("masks", "seeds", "grid", "directions", "objective", "reduction", "num_samples", "model"):
        assert list(getattr(found, name)) == list(getattr(made, name)) if name in ("masks", "seeds") else (
            getattr(found, name) == getattr(made, name)
        )  # fmt: skip
    for name in ("losses", "lengths", "moved"):
        assert (getattr(found, name) == getattr(made, name)).all()
    assert found.provenance["text"] == "t.txt"
    assert found.masks[1] == Mask("random", 0.5, True)
    drawn = gaussian_direction(model, seed=1).tensors
    assert all(torch.equal(found.kept[1, 0].tensors[n], t) for n, t in drawn.items())
    assert not Landscape.from_pretrained(tmp_path / "l").kept
    file = tmp_path / "l" / "landscape.safetensors"
    file.write_bytes(file.read_bytes()[:-8] + b"\0" * 8)
    with pytest.raises(ArtefactError, match="is damaged or another landscape's"):
        Landscape.from_pretrained(tmp_path / "l")
    with pytest.raises(ArtefactError, match=r"no folder .*; expected one that `guided-dropout landscape"):
        Landscape.from_pretrained(tmp_path / "nowhere")
    write_json(tmp_path / "l" / "landscape.json", {"kind": "loss-landscape", "schema": 9})
    with pytest.raises(ArtefactError, match="schema version 9; this version of guided-dropout reads 1"):
        Landscape.from_pretrained(tmp_path / "l")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masks": ["all", "all"]}, "mask all twice"),
        ({"masks": []}, "no masks; expected at least one"),
        ({"masks": ["top:0.5"]}, "without a Fisher profile"),
        ({"seeds": (1, 1)}, r"seeds \[1, 1\]; expected different numbers"),
        ({"directions": "hesian"}, r"unknown directions 'hesian' \(did you mean 'hessian'\?\)"),
        ({"objective": "causal"}, "computes the mlm loss itself, not causal"),
        ({"batch_size": 0}, "batch size 0"),
    ],
)
def test_bad_options_are_told_before_any_point(options, message):
    def never(*_):
        raise AssertionError

    with pytest.raises(ValueError, match=message):
        loss_landscape(language_model("bert"), SAMPLES, **{**LINE, **options}, progress=never)


def test_no_samples_and_no_targets_are_told():
    with pytest.raises(DataError, match="there are no samples"):
        loss_landscape(language_model("bert"), [], **LINE)
    blank = [{"input_ids": [5, 6, 7], "labels": [-100, -100, -100]}]
    with pytest.raises(DataError, match="none of the 1 samples has a target"):
        loss_landscape(language_model("bert"), blank, **LINE)


def test_samples_without_a_target_count_for_nothing_and_are_counted():
    model, blank = language_model("bert").double(), {"input_ids": [5, 6, 7], "labels": [-100, -100, -100]}
    found = loss_landscape(model, [SAMPLES[0], blank, *SAMPLES[1:], blank], batch_size=2, **LINE)
    expected = loss_landscape(model, SAMPLES, batch_size=2, **LINE)
    assert found.losses == pytest.approx(expected.losses, rel=1e-12)
    assert (found.provenance["skipped"], expected.provenance["skipped"]) == (2, 0)
    with pytest.raises(DataError, match="none of the 2 samples has a target"):
        loss_landscape(model, [blank, blank], **LINE)


def test_a_loss_that_is_no_number_at_the_weights_themselves_ends_it_at_the_first_point():
    model = language_model("bert")
    with torch.no_grad():  # the twelfth position: of one sample alone, and not the first
        model.bert.embeddings.position_embeddings.weight[11] = math.nan
    seen = []
    with pytest.raises(ModelError, match="own weights is nan; expected a finite number: `guided-dropout fisher` names"):
        loss_landscape(model, SAMPLES, **LINE, progress=lambda *done: seen.append(done))
    assert not seen
