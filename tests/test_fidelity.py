"""One pass gives what separate estimates of each sub-sample give, whatever stops it; the result says what it found."""

import multiprocessing
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import language_model
from fidelity_oracles import oracle

from guided_dropout import estimate_fisher, find_sites
from guided_dropout.errors import ArtefactError, DataError, GuidedDropoutError
from guided_dropout.fidelity import Fidelity, fidelity
from guided_dropout.fidelity.schedules import order_metrics
from guided_dropout.fidelity.subsamples import draw_subsamples
from guided_dropout.fidelity.table import markdown, parameters_table, schedule_table, summary
from guided_dropout.fisher.checkpoint import holds_state
from guided_dropout.schedule import site_scores

FRACTIONS = (0.5, 0.2, 0.05)
TOPS = (0.2, 0.01)
OPTIONS = {"fractions": FRACTIONS, "tops": TOPS, "draws": 3, "seed": 5, "batch_size": 4}


def draw_samples(number, seed=0):
    g = torch.Generator().manual_seed(seed)
    drawn = []
    for i in range(number):
        ids = torch.randint(5, 64, (3 + (7 * i) % 9,), generator=g)
        drawn.append({"input_ids": ids, "labels": ids.where(torch.rand(len(ids), generator=g) < 0.5, -100)})
        drawn[-1]["labels"][-1] = ids[-1]  # a target, also for a model that predicts the next token
    return drawn


BLANK = {"input_ids": torch.tensor([5, 6]), "labels": torch.tensor([-100, -100])}
SAMPLES = draw_samples(40)


@pytest.fixture(scope="module")
def model():
    return language_model("bert")


@pytest.fixture(scope="module")
def result(model):
    return fidelity(model, iter(SAMPLES), **OPTIONS)


@pytest.mark.parametrize(("number", "fractions", "draws"), [(40, (0.05, 0.5, 0.2), 3), (7, (0.9, 0.1), 1)])
def test_sub_samples_are_nested_and_cells_hold_like_samples(number, fractions, draws):
    drawn = draw_subsamples(number, fractions, draws, seed=1)
    assert drawn.fractions == tuple(sorted(fractions, reverse=True))
    levels = drawn.levels()
    for d in range(draws):
        for k, size in enumerate(drawn.sizes):
            members = drawn.members(d, k)
            assert len(set(members)) == len(members) == size
            assert set(np.flatnonzero(levels[:, d] > k)) == set(members)
            if k:
                assert set(members) <= set(drawn.members(d, k - 1))
    cells = drawn.cells()
    assert sorted(np.concatenate(cells)) == list(range(number))
    assert all(len(np.unique(levels[cell], axis=0)) == 1 for cell in cells)
    assert len({tuple(levels[cell[0]]) for cell in cells}) == len(cells)


def test_sub_samples_are_uniform():
    counts = sum(np.bincount(draw_subsamples(10, (0.3,), 1, s).members(0, 0), minlength=10) for s in range(2000))
    assert np.abs(counts / 2000 - 0.3).max() < 4 * np.sqrt(0.21 / 2000)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_one_pass_is_separate_estimates(family):
    """Tied weights, unseen rows of an embedding, a decoder; samples without a target do not count."""
    model = language_model(family).double()
    samples = [*SAMPLES[:17], BLANK, *SAMPLES[17:]]
    given = {**OPTIONS, "draws": 2}
    result = fidelity(model, iter(samples), **given)
    kept = [s for s in samples if s is not BLANK]
    full = estimate_fisher(model, kept)
    assert (result.num_samples, result.num_skipped) == (40, 1)
    assert result.profile.num_samples == 40
    for name, want in full.diagonal.items():
        torch.testing.assert_close(result.profile.diagonal[name], want, rtol=1e-5, atol=1e-30)
    assert result.profile.tensor_means == pytest.approx(full.tensor_means, rel=1e-9, abs=1e-25)
    sites = [s for s in find_sites(model) if not s.in_head]
    drawn = draw_subsamples(40, FRACTIONS, 2, 5)
    for k, fraction in enumerate(FRACTIONS):
        for d in range(2):
            part = estimate_fisher(model, [kept[i] for i in drawn.members(d, k)])
            for top in TOPS:
                found = {metric: v[d] for metric, v in result.cell(fraction, top).values.items()}
                assert_close(found, oracle(full.diagonal, part.diagonal, top, full.noise))
            scores = [
                np.array(list(site_scores(p, model, sites).values())) for p in (full, replace(part, noise=full.noise))
            ]
            assert {n: v[d] for n, v in result.orders[k].values.items()} == pytest.approx(order_metrics(*scores))


def assert_close(found, want):
    """The oracle sees float32 profiles."""
    assert found.keys() == want.keys()
    for name, w in want.items():
        assert (found[name] is None) == (w is None), name
        if w is not None:
            assert found[name] == pytest.approx(w, rel=1e-4, abs=1e-6), name


def test_batches_change_nothing(model, result):
    other = fidelity(model, SAMPLES, **{**OPTIONS, "batch_size": 40})
    assert_alike(other, result)
    assert_alike(fidelity(model, SAMPLES, **{**OPTIONS, "tokens_per_batch": 30}), result)


def assert_alike(a, b):
    for x, y in zip((*a.cells, *a.orders), (*b.cells, *b.orders), strict=True):
        assert (x.fraction, x.samples) == (y.fraction, y.samples)
        for name in y.values:
            found, want = ([-1 if v is None else v for v in side.values[name]] for side in (x, y))
            assert found == pytest.approx(want, rel=1e-3, abs=1e-5), name
    assert a.curve["samples"] == b.curve["samples"]
    assert a.recommended == b.recommended


def test_the_model_comes_back_as_it_was(model):
    model.train()
    before = {n: (p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    fidelity(model, SAMPLES[:20], fractions=(0.5,), tops=(0.1,), draws=1)
    with pytest.raises(DataError):
        fidelity(model, SAMPLES[:20], fractions=(0.001,), tops=(0.1,), draws=1)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][0])
        assert p.requires_grad == before[name][1]
        assert p.grad is None
    model.eval()


def test_schedules_alone_are_the_same(model, result):
    alone = fidelity(model, SAMPLES, scores_only=True, max_memory=0, **OPTIONS)
    assert alone.cells == ()
    assert not alone.profile.diagonal
    assert alone.orders == result.orders or [o.values for o in alone.orders] == pytest.approx(
        [o.values for o in result.orders]
    )
    assert alone.curve["mean"] == pytest.approx(result.curve["mean"])
    assert "Spearman" not in markdown(alone)


def test_a_model_without_dropout_has_parameters_alone():
    result = fidelity(language_model("mamba"), SAMPLES[:10], fractions=(0.5,), tops=(0.1,), draws=1)
    assert (result.sites, result.orders, result.curve, result.recommended) == (0, (), None, None)
    assert len(result.cells) == 1
    assert "no order to compare" in markdown(result)


def test_what_does_not_fit_is_refused_before_any_work(model):
    planned = []
    message = r"sub-samples need .* MB; expected no more than the 1\.0 MB allowed: lower the number of draws or of frac"
    with pytest.raises(DataError, match=message):
        fidelity(
            model, SAMPLES, max_memory=1_000_000, planned=lambda *_: planned.append(1), **{**OPTIONS, "draws": 200}
        )
    assert not planned


def test_the_memory_told_is_what_the_sums_take(model):
    told = []
    fidelity(model, SAMPLES, planned=lambda *given: told.append(given), **OPTIONS)
    size = sum(p.numel() for p in model.parameters())
    ((number, needed),) = told
    assert number == 40
    assert needed >= (3 * 3 + 2) * 4 * size


class StopError(Exception):
    pass


@pytest.mark.parametrize("scores_only", [False, True])
@pytest.mark.parametrize("number", [1, 23, 40])
def test_stopped_and_resumed_is_as_if_never_stopped(model, result, tmp_path, number, scores_only):
    given = {**OPTIONS, "scores_only": scores_only, "checkpoint": tmp_path / "c", "facts": {"text": "a"}}

    def stop(done):
        if done >= number:
            raise StopError

    with pytest.raises(StopError):
        fidelity(model, SAMPLES, progress=stop, **given)
    assert holds_state(tmp_path / "c")
    with pytest.raises(ArtefactError, match="--resume to go on"):
        fidelity(model, SAMPLES, **given)
    with pytest.raises(ArtefactError, match="draws was 3, is 2"):
        fidelity(model, SAMPLES, resume=True, **{**given, "draws": 2})
    seen = []
    again = fidelity(model, SAMPLES, resume=True, progress=seen.append, **given)
    assert seen[0] >= number
    if not scores_only:
        assert_alike(again, result)
    for name, want in result.profile.tensor_means.items():
        assert again.profile.tensor_means[name] == pytest.approx(want, rel=1e-5, abs=1e-14)


@pytest.mark.parametrize("scores_only", [True, False])
def test_more_or_fewer_samples_are_another_run(model, tmp_path, scores_only):
    given = {**OPTIONS, "scores_only": scores_only, "checkpoint": tmp_path / "c"}

    def stop(_):
        raise StopError

    with pytest.raises(StopError):
        fidelity(model, SAMPLES, progress=stop, **given)
    with pytest.raises(ArtefactError, match="items was"):
        fidelity(model, SAMPLES[:-3], resume=True, **given)


def _run_until_killed(folder, number):
    def kill(done):
        if done >= number:
            os.kill(os.getpid(), signal.SIGKILL)

    fidelity(language_model("bert"), SAMPLES, checkpoint=folder, checkpoint_every=0, progress=kill, **OPTIONS)


def test_killed_and_resumed_is_as_if_never_killed(model, result, tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_run_until_killed, args=(tmp_path / "c", 25))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    seen = []
    again = fidelity(model, SAMPLES, checkpoint=tmp_path / "c", resume=True, progress=seen.append, **OPTIONS)
    assert seen[0] >= 20
    assert_alike(again, result)


def test_it_is_read_as_it_was_written(result, tmp_path):
    path = result.save(tmp_path / "new" / "fidelity.json")
    assert Fidelity.load(path) == result
    path.write_text(path.read_text().replace('"curve"', '"kurve"'))
    with pytest.raises(ArtefactError, match="no whole fisher-fidelity file"):
        Fidelity.load(path)
    with pytest.raises(ArtefactError, match=r"no comparison of a fraction of 0\.3"):
        result.cell(0.3, 0.2)


def test_tables_hold_each_cell_with_its_spread(result):
    heads, rows = parameters_table(result)
    assert len(rows) == len(FRACTIONS) * len(TOPS)
    assert {len(row) for row in rows} == {len(heads)}
    values = result.cell(0.2, 0.01).values["overlap"]
    row = next(r for r in rows if r[:2] == ["1 %", "20 %"])
    assert row[2:4] == ["8", f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"]
    heads, rows = schedule_table(result)
    assert [row[:2] for row in rows] == [["50 %", "20"], ["20 %", "8"], ["5 %", "2"]]
    assert f"{result.recommended} samples: from there on" in markdown(result)


def test_where_there_is_no_order_it_is_said_why(result):
    (said,) = summary(replace(result, curve=None, bootstrap=None, recommended=None))
    assert said == f"{result.sites} dropout sites, no two of which differ in score: no order to compare."


def test_the_papers_figures_stand_beside_their_like(model):
    result = fidelity(model, SAMPLES, fractions=(0.33, 0.2), tops=(0.05,), draws=1)
    heads, rows = parameters_table(result)
    assert heads[-1] == "paper's four"
    assert [row[-1] for row in rows] == ["0.986 0.041 0.005 0.030", ""] or rows[0][-1].startswith("0.986 0.041")
    assert "heads of its columns are lost" in markdown(result)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fractions": ()}, "no fraction of the samples"),
        ({"fractions": (0.5, 1.0)}, "fraction 1 of the samples; expected a number between 0 and 1"),
        ({"fractions": (0.5, 0.5)}, "expected each of them once"),
        ({"fractions": (0.001,)}, r"fraction 0\.001 of 40 samples is no sample; .* or give 500 samples or more"),
        ({"draws": 0}, "0 draws; expected at least 1"),
        ({"tops": (0.0,)}, "top share 0 of the parameters"),
        ({"tops": (0.1, 0.1)}, "expected one or more, each once"),
        ({"tau": 0}, "tau 0; expected"),
        ({"grouping": "owners"}, "did you mean 'owner'"),
        ({"seed": -1}, "seed -1; expected 0 or more"),
        ({"batch_size": 0}, "batch size 0; expected at least 1"),
        ({"tokens_per_batch": -5}, "tokens per batch -5; expected at least 1"),
    ],
)
def test_bad_settings_are_refused(model, changes, message):
    with pytest.raises(GuidedDropoutError, match=message):
        fidelity(model, SAMPLES, **{**OPTIONS, **changes})


def test_nothing_to_measure_is_refused(model):
    with pytest.raises(DataError, match="none of the 2 samples has a target"):
        fidelity(model, [BLANK, BLANK])
