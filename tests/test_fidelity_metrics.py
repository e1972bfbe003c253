"""Each metric is that of a slow computation in float64 that sorts everything."""

import itertools
import math

import numpy as np
import pytest
import torch
from fidelity_oracles import oracle
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import entropy, kendalltau

from guided_dropout.errors import ArtefactError, DataError
from guided_dropout.fidelity.metrics import METRICS, compare, largest, value_metrics, values_at
from guided_dropout.fidelity.schedules import bootstrap, curve, order_metrics, recommended
from guided_dropout.fisher.order import kendall_taus

VALUE = st.floats(1e-6, 1e6) | st.sampled_from([0.0, 1.0])
SHAPES = {"a": (7, 5), "b": (11,), "c": (), "d": (3, 4, 2)}


def values(seed, *, zeros=0.0, levels=None):
    """Of many orders of magnitude; with `levels` only so many different ones, so that there are ties."""
    g = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in SHAPES.items():
        x = torch.randn(shape, generator=g, dtype=torch.float64).mul(2)
        x = x.exp() if levels is None else x.abs().mul(levels / 6).floor() + 1
        found[name] = x.where(torch.rand(shape, generator=g) >= zeros, 0).float()
    return found


def assert_same(found, want):
    assert found.keys() == want.keys() == set(METRICS)
    for name, w in want.items():
        assert (found[name] is None) == (w is None), name
        if w is not None:
            assert found[name] == pytest.approx(w, rel=1e-9, abs=1e-12), name


@pytest.mark.parametrize("zeros", [0.0, 0.4])
@pytest.mark.parametrize("levels", [None, 5])
@pytest.mark.parametrize("exclude", [(), ("b", "c")])
def test_all_metrics_are_those_of_sorting(zeros, levels, exclude):
    full, sub = values(0, levels=levels), values(1, zeros=zeros, levels=levels)
    tops = (0.001, 0.05, 0.3, 1.0)
    found = compare(largest(full, max(tops), exclude), {n: 8 * t for n, t in sub.items()}, 1 / 8, tops, exclude)
    for top in tops:
        assert_same(found[top], oracle(full, sub, top, exclude))


@settings(deadline=None, max_examples=60)
@example([(349526.0, 1.0), (349526.0, 1.0), (349525.9921875, 1.0)])  # a divergence within rounding
@given(
    pairs=st.lists(
        st.tuples(VALUE, VALUE),
        min_size=3, max_size=25,
    )
)  # fmt: skip
def test_value_metrics_over_wide_ranges(pairs):
    f, g = (np.array(side) for side in zip(*pairs, strict=True))
    found = value_metrics(f, g)
    want = oracle({"x": torch.tensor(f)}, {"x": torch.tensor(g)}, 1.0)
    for name in ("js", "kl", "kl_reverse", "mean_error", "rms_error", "zeros"):
        assert (found[name] is None) == (want[name] is None), name
        if want[name] is not None:
            assert found[name] == pytest.approx(want[name], rel=1e-7, abs=1e-9), name


def test_the_same_values_have_nothing_wrong():
    full = values(2)
    found = compare(largest(full, 0.5), full, 1.0, (0.5,))[0.5]
    for name, value in found.items():
        assert value == pytest.approx(1.0 if name in ("overlap", "spearman", "pearson", "cosine") else 0.0, abs=1e-12)


def test_what_is_not_defined_is_none():
    zero = value_metrics([1.0, 2.0], [0.0, 0.0])
    assert [zero[name] for name in ("spearman", "pearson", "cosine", "js", "kl", "kl_reverse")] == [None] * 6
    assert (zero["mean_error"], zero["rms_error"], zero["zeros"]) == (1.0, 1.0, 1.0)
    one = value_metrics([1.0, 2.0, 3.0], [0.0, 2.0, 3.0])
    assert one["kl"] is None
    assert one["kl_reverse"] == pytest.approx(entropy([0, 2, 3], [1, 2, 3]))
    assert 0 < one["js"] < math.log(2)


def test_small_values_keep_their_digits():
    tiny = value_metrics(np.array([1.0, 2.0, 4.0]) * 1e-200, np.array([1.0, 2.0, 3.0]) * 1e-200)
    usual = value_metrics([1.0, 2.0, 4.0], [1.0, 2.0, 3.0])
    assert tiny["pearson"] == pytest.approx(usual["pearson"])
    assert tiny["js"] == pytest.approx(usual["js"])


def test_places_lead_back_to_the_values():
    full = values(3, levels=4)
    top = largest(full, 0.7)
    assert (np.diff(top.values) <= 0).all()
    np.testing.assert_array_equal(values_at(full, top.places), top.values)
    everything = torch.cat([t.flatten() for t in full.values()]).double().numpy()
    np.testing.assert_array_equal(everything[top.places], top.values)
    assert all(a < b for a, b in itertools.pairwise(top.places[top.values == top.values[0]]))


def test_bad_shares_and_values_are_refused():
    for top in (0.0, 1.5, float("nan")):
        with pytest.raises(DataError, match="expected a number above 0 and up to 1"):
            largest(values(0), top)
    with pytest.raises(ArtefactError, match="a Fisher value of a is -1"):
        largest({"a": torch.tensor([-1.0, 1.0])}, 0.5)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(2, 9).flatmap(
        lambda n: st.lists(st.lists(st.integers(0, 5), min_size=n, max_size=n), min_size=2, max_size=5)
    )
)
def test_taus_are_scipys(rows):
    reference, *others = np.array(rows, dtype=float)
    want = [
        np.nan if len(set(reference)) < 2 or len(set(o)) < 2 else kendalltau(reference, o).statistic for o in others
    ]
    np.testing.assert_allclose(kendall_taus(reference, np.array(others)), want, atol=1e-12)


def test_many_taus_at_once_are_those_one_by_one():
    rng = np.random.default_rng(0)
    a, b = rng.random(120), rng.random((3, 500, 120))
    found = kendall_taus(a, b)
    assert found.shape == (3, 500)
    assert found[2, 17] == pytest.approx(kendalltau(a, b[2, 17]).statistic, abs=1e-12)


def test_order_metrics_count_the_sites_that_moved():
    found = order_metrics(np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 4.0, 3.0, 2.0]))
    assert found == {"tau": pytest.approx(0.0), "moved": 2, "largest_move": 2.0}
    assert order_metrics(np.array([1.0, 1.0]), np.array([1.0, 1.0]))["tau"] is None


def scores(number, spread, seed=0):
    """Of sites whose true scores rise by `spread`, with a noise common to all and one of their own."""
    rng = np.random.default_rng(seed)
    true = (1 + spread) ** np.arange(12)
    return true * np.exp(0.4 * rng.standard_normal((number, 1)) + 0.3 * rng.standard_normal((number, 12)))


def test_sub_samples_that_order_nothing_agree_with_nothing():
    """A sample that the model predicts to the last digit has a gradient of zero everywhere."""
    scores = np.random.default_rng(0).random((10, 4))
    scores[:7] = 0
    found = curve(scores, seed=0)
    assert found["lower"][0] <= found["lowest"][0] + 1 <= 1
    assert np.isfinite([*found["mean"], *found["lower"], *found["lowest"]]).all()
    assert recommended(found, 0.95) > 1
    assert np.isfinite(list(bootstrap(scores[6:8], seed=0).values())).all()


def test_the_curve_is_that_of_drawing_each_sub_sample():
    x = scores(60, 0.03)
    found = curve(x, seed=3)
    assert found["samples"][0] == 1
    assert found["samples"][-1] == 60
    for at in (0, len(found["samples"]) // 2, len(found["samples"]) - 1):
        taus = []
        for r in range(found["subsamples"]):
            drawn = np.random.default_rng([3, 5, r]).permutation(60)[: found["samples"][at]]
            taus.append(kendalltau(x.mean(0), x[drawn].mean(0)).statistic)
        assert found["mean"][at] == pytest.approx(np.mean(taus))
        assert found["lowest"][at] == pytest.approx(min(taus))
        assert np.mean(np.array(taus) >= found["lower"][at] - 1e-12) >= 0.95
    assert found["lower"][-1] == pytest.approx(1)


def test_clear_orders_need_fewer_samples_and_are_surer():
    clear, close = (scores(400, spread) for spread in (0.3, 0.02))
    assert recommended(curve(clear, 0), 0.95) < 40 < recommended(curve(close, 0), 0.95)
    assert bootstrap(clear, 0)["lower"] > bootstrap(close, 0)["lower"]


def test_the_bootstrap_foretells_the_tau_of_another_text():
    first, second = scores(300, 0.03, seed=1), scores(300, 0.03, seed=2)
    between = kendalltau(first.mean(0), second.mean(0)).statistic
    assert bootstrap(first, 0)["lower"] - 0.1 <= between <= 1
    assert bootstrap(first, 0)["mean"] < 1


def test_recommended_looks_at_all_larger_sizes():
    found = {"samples": [1, 2, 3, 4, 5], "lower": [0.2, 0.96, 0.9, 0.95, 1.0]}
    assert recommended(found, 0.95) == 4
    assert recommended(found, 0.1) == 1
    assert recommended(found, 1.0) == 5
