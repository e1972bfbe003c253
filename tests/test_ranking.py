"""The sequential test of the order of scores: rarely wrong, however often it is looked at; early where it is easy."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import VOCAB, language_model
from hypothesis import given, settings
from hypothesis import strategies as st

from guided_dropout import estimate_fisher, find_sites
from guided_dropout.detection import detect_objective
from guided_dropout.errors import ArtefactError, DataError
from guided_dropout.fisher.check import checked_plan
from guided_dropout.fisher.fast import BatchedSquares
from guided_dropout.fisher.ranking import MIN_SAMPLES, RankingTest
from guided_dropout.schedule import site_scores

SITES = "abcd"
GROUPS = {site: [f"{site}.weight", f"{site}.bias"] for site in SITES}
MAXIMUM = 1000
ALPHA = 0.05


def lognormal(rng, sigma, shape):
    """With mean 1; its coefficient of variation is 0.2 for sigma 0.2, 1.3 for 1."""
    return np.exp(sigma * rng.standard_normal(shape) - sigma**2 / 2)


def like_a_bert(rng, true):
    """What six-layer BERTs show: most of a sample's weight is common to all sites."""
    return true * lognormal(rng, 0.45, (MAXIMUM, 1)) * lognormal(rng, 0.2, (MAXIMUM, len(true)))


def exponential(rng, true):
    return true * rng.exponential(size=(MAXIMUM, len(true)))


def heavy(rng, true):
    return true * lognormal(rng, 1.0, (MAXIMUM, len(true)))


def one_heavy(rng, true):
    """The lowest site is steady, so the others' rare large samples are what decides."""
    return true * lognormal(rng, np.array([0.1, 1.0, 1.0, 1.0]), (MAXIMUM, len(true)))


def means(scores):
    """Per-tensor means of samples with such scores [B, S]: the weight's is a half of the bias'."""
    columns = {site: scores[:, k] for k, site in enumerate(SITES)}
    return {f"{s}.{p}": y * f for s, y in columns.items() for p, f in (("weight", 2 / 3), ("bias", 4 / 3))}


def run(samples, every=10, **changes):
    test = RankingTest(GROUPS, **{"alpha": ALPHA, "tolerance": 0.05, **changes})
    for start in range(0, len(samples), every):
        test.add(means(samples[start : start + every]))
        if test.settled:
            break
    return test.report()


def wrong(report, true):
    """Whether a settled order has neighbours the wrong way round by more than the tolerance."""
    scores = [true[SITES.index(site)] for site in report["order"]]
    limit = 1 + report["tolerance"]
    return report["settled"] and any(low > limit * high for low, high in itertools.pairwise(scores))


@pytest.mark.parametrize("draw", [like_a_bert, exponential, heavy, one_heavy])
def test_the_order_is_wrong_less_often_than_alpha(draw):
    true, rng = [1.0, 1.08, 1.16, 1.25], np.random.default_rng(0)
    reports = [run(draw(rng, np.array(true)), every=50) for _ in range(100)]
    assert np.mean([wrong(r, true) for r in reports]) <= ALPHA


def test_rare_large_samples_are_reckoned_with():
    """A site whose few large samples make up its score looks low until they have come."""
    rng, runs = np.random.default_rng(0), 300
    wrongs = 0
    for _ in range(runs):
        steady, rare = lognormal(rng, 0.1, 600), 1.1 * lognormal(rng, 1.5, 600)
        test = RankingTest({"steady": ["p"], "rare": ["q"]}, alpha=ALPHA)
        for start in range(0, 600, 50):
            test.add({"p": steady[start : start + 50], "q": rare[start : start + 50]})
            if test.settled:
                wrongs += test.report()["order"] == ["rare", "steady"]
                break
    assert wrongs / runs <= ALPHA


def test_the_same_data_lead_repeated_t_tests_astray():
    """So the runs above can tell a valid test from one that is not."""
    true, rng, runs = np.array([1.0, 1.06]), np.random.default_rng(0), 200
    n = np.arange(1, MAXIMUM + 1)[:, None]
    wrongs = 0
    for _ in range(runs):
        samples = one_heavy(rng, np.array([*true, 1, 1]))[:, :2]
        d = samples[:, :1] * 1.05 - samples[:, 1:]
        mean = d.cumsum(0) / n
        t = mean / np.sqrt(np.maximum((d**2).cumsum(0) / n - mean**2, 1e-12) / n)
        wrongs += bool((t[MIN_SAMPLES::10] > 1.645).any())
    assert wrongs / runs > 2 * ALPHA


def test_clear_orders_stop_early_and_close_ones_later():
    rng = np.random.default_rng(1)
    clear = run(like_a_bert(rng, np.array([8.0, 1.0, 2.0, 4.0])))
    close = run(like_a_bert(rng, np.array([1.3, 1.0, 1.1, 1.2])))
    assert clear["order"] == ["b", "c", "d", "a"]
    assert clear["samples"] == MIN_SAMPLES < close["samples"] < MAXIMUM
    assert close["settled"]
    assert clear["within_tolerance"] == clear["undecided"] == []


def test_ties_are_settled_by_the_tolerance_and_otherwise_end_undecided():
    samples = like_a_bert(np.random.default_rng(2), np.array([1.0, 1.0, 3.0, 9.0]))
    report = run(samples, tolerance=0.0)
    assert report["samples"] == MAXIMUM
    assert not report["settled"]
    assert [sorted(pair) for pair in report["undecided"]] == [["a", "b"]]
    report = run(samples, tolerance=0.1)
    assert report["settled"]
    assert report["samples"] < MAXIMUM
    assert [sorted(pair) for pair in report["within_tolerance"]] == [["a", "b"]]


def test_a_lower_alpha_takes_longer():
    samples = like_a_bert(np.random.default_rng(3), np.array([1.0, 1.1, 1.2, 1.3]))
    assert run(samples, alpha=1e-6)["samples"] > run(samples, alpha=0.2)["samples"] > MIN_SAMPLES


def test_scores_are_means_over_the_tensors_of_a_site():
    test = RankingTest({"x": ["p", "q"], "y": ["q"]})
    test.add({"p": np.full(MIN_SAMPLES, 1.0), "q": np.full(MIN_SAMPLES, 2.0), "other": [1.0]})
    assert test.report()["order"] == ["x", "y"]
    test.add({"p": np.full(MIN_SAMPLES, 9.0), "q": np.full(MIN_SAMPLES, 2.0)})
    assert test.report()["order"] == ["y", "x"]


def test_excluded_parameters_do_not_enter_the_mean():
    test = RankingTest({"x": ["p", "noise"], "y": ["q"]})
    test.exclude(["noise"])
    test.add({"p": np.full(200, 3.0), "q": np.full(200, 2.0)})
    assert test.report()["order"] == ["y", "x"]
    with pytest.raises(DataError, match="200 samples are ranked already"):
        test.exclude(["p"])
    with pytest.raises(DataError, match="no parameter with a gradient feeds y"):
        RankingTest({"x": ["p"], "y": ["q"]}).exclude(["q"])


def test_the_order_is_that_of_the_profile_of_the_same_samples():
    model = language_model("bert").double()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCAB, (MIN_SAMPLES, 9), generator=generator).tolist()
    samples = [{"input_ids": row, "labels": [*row[:4], *[-100] * 5]} for row in ids]
    sites = [site for site in find_sites(model) if not site.in_head]
    test = RankingTest({site.path: site.parameters for site in sites})
    parameters, goal = dict(model.requires_grad_(False).named_parameters()), detect_objective(model, samples[0])
    plan = checked_plan(model, goal, parameters, samples[:4])
    assert any(name.endswith("key.bias") for name in plan.noise)
    test.exclude(plan.noise)
    squares = BatchedSquares(model, goal, parameters, plan, scores_only=True, per_sample=True)
    for start in range(0, MIN_SAMPLES, 25):
        sums = squares.add(samples[start : start + 25]).tensor_sums
        test.add({name: s / parameters[name].numel() for name, s in sums.items()})
    profile = replace(estimate_fisher(model, samples, batch_size=25), noise=sorted(plan.noise))
    scores = site_scores(profile, model, sites)
    assert test.samples == MIN_SAMPLES
    assert test.report()["order"] == sorted(scores, key=scores.get)


def test_sites_with_the_same_parameters_are_one():
    rng = np.random.default_rng(4)
    test = RankingTest({"x": ["p", "q"], "y": ["r"], "z": ["q", "p"]}, tolerance=0.0)
    for _ in range(60):
        test.add({n: f * lognormal(rng, 0.3, 10) for n, f in (("p", 1.0), ("q", 2.0), ("r", 1.0))})
    report = test.report()
    assert report["settled"]
    assert report["order"] == ["y", "x", "z"]
    alone = RankingTest({"x": ["p"], "z": ["p"]})
    alone.add({"p": np.ones(MIN_SAMPLES)})
    assert alone.settled


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 99),
    cuts=st.lists(st.integers(1, 299), max_size=8, unique=True).map(sorted),
    scale=st.sampled_from([1e-12, 1.0, 1e6]),
)
def test_batches_scale_and_a_way_through_json_change_nothing(seed, cuts, scale):
    samples = like_a_bert(np.random.default_rng(seed), np.array([1.0, 1.2, 1.1, 2.0]))[:300]
    whole = RankingTest(GROUPS)
    whole.add(means(samples))
    parts = RankingTest(GROUPS)
    for start, end in zip([0, *cuts], [*cuts, 300], strict=True):
        resumed = RankingTest(GROUPS)
        resumed.load_state(json.loads(json.dumps(parts.state())))
        resumed.add(means(scale * samples[start:end]))
        parts = resumed
    assert parts.report() == whole.report()
    np.testing.assert_allclose(parts.state()["scatter"], scale**2 * np.cov(samples.T) * 299, rtol=1e-9)
    np.testing.assert_allclose(parts.state()["mean"], scale * samples.mean(0), rtol=1e-12)


def test_a_state_of_another_test_is_refused():
    state = RankingTest(GROUPS, alpha=0.01).state()
    with pytest.raises(ArtefactError, match=r"begun with alpha 0\.01; expected 0\.05"):
        RankingTest(GROUPS).load_state(state)
    with pytest.raises(ArtefactError, match=r"begun with a fed by \['a.weight', 'a.bias'\]; expected \['a.weight'\]"):
        RankingTest({"a": ["a.weight"]}, alpha=0.01).load_state(state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 0.0}, "alpha 0.0; expected a chance"),
        ({"alpha": 1.0}, "alpha 1.0"),
        ({"tolerance": -0.1}, "rank tolerance -0.1; expected"),
        ({"tolerance": np.nan}, "rank tolerance nan"),
        ({"groups": {}}, "no sites to rank"),
        ({"groups": {"a": []}}, "no parameter with a gradient feeds a"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(DataError, match=message):
        RankingTest(**{"groups": GROUPS, **changes})


@pytest.mark.parametrize(
    ("means", "message"),
    [
        ({"p": [1.0]}, "no values of q"),
        ({"p": [1.0], "q": [1.0, 2.0]}, r"values of shapes \[1\], \[2\]; expected one number a sample"),
        ({"p": 1.0, "q": 2.0}, r"values of shapes \[\]"),
        ({"p": [1.0], "q": [np.nan]}, "a mean square of q is negative or not finite"),
        ({"p": [-1.0], "q": [1.0]}, "a mean square of p is negative"),
    ],
)
def test_bad_batches_are_refused(means, message):
    with pytest.raises(DataError, match=message):
        RankingTest({"x": ["p"], "y": ["q"]}).add(means)


def test_a_run_with_noise_goes_on_when_resumed(tmp_path):
    """What is left out of the scores on the way is left out of the state's."""
    model = language_model("bert")
    g = torch.Generator().manual_seed(4)
    samples = [{"input_ids": (ids := torch.randint(5, VOCAB, (9,), generator=g)), "labels": ids} for _ in range(120)]
    samples.insert(3, {"input_ids": [5, 6], "labels": [-100, -100]})
    sites = {s.path: s.parameters for s in find_sites(model) if not s.in_head}

    def estimate(**changes):
        rule = RankingTest(sites, tolerance=3.0)
        return estimate_fisher(model, iter(samples), until_ranked=rule, scores_only=True, **changes)

    expected = estimate()
    used = RankingTest(sites, tolerance=3.0)
    used.exclude(expected.noise)
    used.add({name: np.ones(104) for name in expected.tensor_means})
    with pytest.raises(DataError, match="told 104 samples before; expected one that was told none"):
        estimate_fisher(model, iter(samples), until_ranked=used)
    for number in (50, expected.num_samples):  # on the way, and when it is settled already

        def stop(done, number=number):
            if done >= number:
                raise KeyError(done)

        with pytest.raises(KeyError):
            estimate(checkpoint=tmp_path / str(number), progress=stop)
        found = estimate(checkpoint=tmp_path / str(number), resume=True)
        assert found.provenance["ranking"] == expected.provenance["ranking"]
        assert (found.num_samples, found.num_skipped) == (expected.num_samples, expected.num_skipped)
