"""The rule that stops when the order as a whole is stable: rarely too early, and the same however it is fed."""

import json

import numpy as np
import pytest
import torch
from families import language_model
from scipy.stats import kendalltau

from guided_dropout import estimate_fisher, find_sites
from guided_dropout.errors import ArtefactError, DataError
from guided_dropout.fisher import RankingTest, StabilityTest
from guided_dropout.fisher.ranking import MIN_SAMPLES

SITES = [f"s{i}" for i in range(16)]
GROUPS = {site: [f"{site}.weight"] for site in SITES}


def samples(rng, factor, number=4000):
    """True scores rise by `factor`; most of a sample's weight is common to all sites, as in a BERT."""
    true = factor ** np.arange(len(SITES))
    common, own = rng.standard_normal((number, 1)), rng.standard_normal((number, len(SITES)))
    return true, true * np.exp(0.8 * common + 0.6 * own - 0.5)


def means(scores):
    return {f"{site}.weight": scores[:, i] for i, site in enumerate(SITES)}


def run(scores, every=25, **changes):
    test = StabilityTest(GROUPS, **changes)
    for start in range(0, len(scores), every):
        test.add(means(scores[start : start + every]))
        if test.settled:
            break
    return test.report()


def test_where_it_stops_the_order_is_as_good_as_asked():
    rng, good = np.random.default_rng(0), []
    for _ in range(25):
        true, scores = samples(rng, 1.1)
        report = run(scores)
        assert report["settled"]
        order = [SITES.index(site) for site in report["order"]]
        good.append(kendalltau(np.argsort(order), true).statistic >= 0.95)
    assert np.mean(good) >= 0.8


def test_clear_orders_stop_early_and_close_ones_later():
    rng = np.random.default_rng(1)
    clear, close = (run(samples(rng, factor)[1]) for factor in (2.0, 1.05))
    assert clear["order"] == SITES
    assert MIN_SAMPLES == clear["samples"] < close["samples"]


def test_less_is_asked_sooner_had():
    scores = samples(np.random.default_rng(2), 1.08)[1]
    assert run(scores, tau=0.8)["samples"] < run(scores)["samples"] < run(scores, tau=0.98)["samples"]


def test_one_near_tie_does_not_keep_it_as_it_keeps_the_ranking():
    rng = np.random.default_rng(3)
    _, scores = samples(rng, 1.5, 1000)
    scores[:, 8] = scores[:, 7] * np.exp(0.5 * rng.standard_normal(1000))
    ranking = RankingTest(GROUPS, tolerance=0.0)
    ranking.add(means(scores))
    assert not ranking.settled
    assert run(scores)["settled"]


def test_batches_and_a_way_through_json_change_nothing():
    scores = samples(np.random.default_rng(4), 1.2, 150)[1]
    whole, parts = StabilityTest(GROUPS, seed=7), StabilityTest(GROUPS, seed=7)
    whole.add(means(scores))
    for start in range(0, 150, 7):
        resumed = StabilityTest(GROUPS, seed=7)
        resumed.load_state(json.loads(json.dumps(parts.state())))
        parts = resumed
        parts.add(means(scores[start : start + 7]))
    a, b = whole.report(), parts.report()
    assert a["order"] == b["order"]
    assert a["tau_lower"] == pytest.approx(b["tau_lower"])
    np.testing.assert_allclose(whole.state()["replicates"], parts.state()["replicates"], rtol=1e-9)


def test_the_lower_tau_is_that_of_the_replicates_one_by_one():
    scores = samples(np.random.default_rng(5), 1.05, 120)[1]
    test = StabilityTest(GROUPS, seed=1)
    test.add(means(scores))
    weights = np.stack([np.random.default_rng([1, 6, i]).poisson(1.0, 200) for i in range(120)])
    taus = sorted(kendalltau(scores.sum(0), weights[:, r] @ scores).statistic for r in range(200))
    assert test.report()["tau_lower"] == pytest.approx(taus[9])  # at most 9 of 200 lie below


def test_one_site_is_in_order():
    test = StabilityTest({"a": ["p"], "b": ["p"]})
    test.add({"p": np.ones(MIN_SAMPLES)})
    assert test.settled
    assert test.report()["order"] == ["a", "b"]


def test_equal_scores_are_never_stable():
    test = StabilityTest({"a": ["p"], "b": ["q"]})
    test.add({"p": np.ones(500), "q": np.ones(500)})
    assert not test.settled
    assert test.report()["tau_lower"] is None


def test_bad_settings_and_states_are_refused():
    with pytest.raises(DataError, match="tau 1"):
        StabilityTest(GROUPS, tau=1)
    with pytest.raises(DataError, match="confidence 0"):
        StabilityTest(GROUPS, confidence=0)
    with pytest.raises(DataError, match="no sites to rank"):
        StabilityTest({})
    with pytest.raises(ArtefactError, match=r"begun with tau 0\.9; expected 0\.95"):
        StabilityTest(GROUPS).load_state(StabilityTest(GROUPS, tau=0.9).state())


def test_an_estimate_ends_by_it_and_goes_on_when_resumed(tmp_path):
    model = language_model("bert")
    g = torch.Generator().manual_seed(4)
    drawn = [{"input_ids": (ids := torch.randint(5, 64, (9,), generator=g)), "labels": ids} for _ in range(400)]
    sites = {s.path: s.parameters for s in find_sites(model) if not s.in_head}

    class StopError(Exception):
        pass

    def stop(done):
        if done >= 80:
            raise StopError

    def estimate(**changes):
        rule = StabilityTest(sites, tau=0.5)  # attention's key biases are left out on the way
        return estimate_fisher(model, iter(drawn), until_ranked=rule, scores_only=True, **changes)

    whole = estimate()
    found = whole.provenance["ranking"]
    assert found["rule"] == "stable"
    assert found["settled"]
    assert MIN_SAMPLES <= found["samples"] == whole.num_samples < 400
    with pytest.raises(StopError):
        estimate(checkpoint=tmp_path / "c", progress=stop)
    with pytest.raises(ArtefactError, match=r'until_ranked\.rule was "stable", is "ranked"'):
        estimate_fisher(
            model,
            iter(drawn),
            until_ranked=RankingTest(sites),
            scores_only=True,
            checkpoint=tmp_path / "c",
            resume=True,
        )
    assert estimate(checkpoint=tmp_path / "c", resume=True).provenance["ranking"] == found
