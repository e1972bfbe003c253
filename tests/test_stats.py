"""Paired statistics against worked examples, scipy's own functions and simulation."""

import itertools

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from guided_dropout.errors import DataError
from guided_dropout.stats import holm, paired_comparison, probability_of_improvement, share_better, summarise, verdict

# Student (1908), "The probable error of a mean": hours of sleep gained by ten patients under two drugs.
SLEEP_1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SLEEP_2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95])
def test_a_confidence_that_is_none_is_refused(confidence):
    for found in (lambda: summarise(SLEEP_1, confidence=confidence),
                  lambda: paired_comparison(SLEEP_1, SLEEP_2, confidence=confidence)):  # fmt: skip
        with pytest.raises(DataError, match=f"found confidence {confidence}; expected a number between 0 and 1"):
            found()


def test_what_differs_by_rounding_alone_is_a_tie_and_what_has_no_metric_is_worst():
    pairs = [(0.1 + 0.2, 0.3), (-np.inf, -np.inf), (-np.inf, 0.0), (0.3 + 1e-9, 0.3)]
    assert share_better(pairs) == (0.5 + 0.5 + 0 + 1) / 4
    assert paired_comparison([0.1 + 0.2] * 3, [0.3] * 3).improved == 0.5


def test_students_sleep_data_as_published():
    c = paired_comparison(SLEEP_2, SLEEP_1)
    assert c.n == 10
    assert c.mean == pytest.approx(1.58)
    assert c.median == pytest.approx(1.3)
    # R's t.test(extra ~ group, paired = TRUE) prints 0.7001142 and 2.4598858.
    assert c.t_interval == pytest.approx((0.7001142, 2.4598858), abs=1e-7)
    assert c.improved == pytest.approx(0.95)
    assert verdict(c) == "helps"
    assert verdict(paired_comparison(SLEEP_1, SLEEP_2)) == "hurts"


# Hollander & Wolfe (1973), p. 29: depression of nine patients before and after a tranquilliser.
DEPRESSION_1 = [1.83, 0.50, 1.62, 2.48, 1.68, 1.88, 1.55, 3.06, 1.30]
DEPRESSION_2 = [0.878, 0.647, 0.598, 2.05, 1.06, 1.29, 1.06, 3.14, 1.29]
# Darwin (1876), after Fisher (1935): eighths of an inch by which crossed maize outgrew self-fertilised.
MAIZE = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]


def test_hollander_and_wolfes_depression_data():
    # R's wilcox.test(x, y, paired = TRUE, alternative = "greater") prints V = 40, p-value = 0.01953.
    assert paired_comparison(DEPRESSION_1, DEPRESSION_2).wilcoxon_p == pytest.approx(2 * 0.01953, abs=1e-5)


def test_darwins_maize():
    c = paired_comparison(MAIZE, np.zeros(15))
    assert c.mean == pytest.approx(20.933, abs=1e-3)
    assert c.t_p == pytest.approx(0.0497, abs=1e-4)  # Fisher: t = 2.148, just beyond 5 %
    assert c.t_interval is not None
    assert c.t_interval[0] == pytest.approx(0.03, abs=0.01)
    assert c.wilcoxon_p == pytest.approx(0.041259765625)  # scipy's documentation of `wilcoxon`
    assert c.quartiles == (11.0, 45.0)


def test_bootstrap_interval_agrees_with_rs_boot():
    # R: boot(x, function(x, a) mean(x[a]), 1000000), boot.ci; as in scipy's own tests.
    x = [10, 12, 12.5, 12.5, 13.9, 15, 21, 22, 23, 34, 50, 81, 89, 121, 134, 213]
    intervals = [paired_comparison(x, np.zeros(16), seed=s).bca_interval for s in range(20)]
    assert np.mean(intervals, axis=0) == pytest.approx((32.31, 91.43), rel=0.01)


def test_bootstrap_interval_agrees_with_efrons_formula_over_all_resamples():
    x = np.array([0.0137, -0.0041, 0.0212, 0.0309, -0.0178, 0.0254])
    means = np.mean(list(itertools.product(x, repeat=6)), axis=1).round(12)
    mean = round(x.mean(), 12)
    z0 = scipy.stats.norm.ppf(((means < mean).mean() + (means <= mean).mean()) / 2)
    jackknife = np.array([np.delete(x, i).mean() for i in range(6)])
    d = jackknife.mean() - jackknife
    acceleration = (d**3).sum() / (6 * (d**2).sum() ** 1.5)
    z = z0 + scipy.stats.norm.ppf([0.025, 0.975])
    levels = scipy.stats.norm.cdf(z0 + z / (1 - acceleration * z))
    exact = np.quantile(means, levels)
    found = np.mean([paired_comparison(x, np.zeros(6), seed=s).bca_interval for s in range(10)], axis=0)
    assert found == pytest.approx(exact, abs=4e-4)


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=8))
def test_signed_rank_p_is_that_of_all_signs(values):
    d = np.array([v for v in values if v], dtype=float)
    p = paired_comparison(values, np.zeros(len(values))).wilcoxon_p
    if not len(d):
        assert p is None
        return
    ranks = scipy.stats.rankdata(np.abs(d))
    sums = [ranks[np.array(signs) > 0].sum() for signs in itertools.product((-1, 1), repeat=len(d))]
    observed = ranks[d > 0].sum()
    one_sided = min(np.mean(np.array(sums) <= observed), np.mean(np.array(sums) >= observed))
    assert p == pytest.approx(min(1, 2 * one_sided))


def test_signed_rank_p_is_scipys():
    rng = np.random.default_rng(0)
    for n in (3, 9, 30):
        d = rng.normal(0.3, 1, size=n)
        assert paired_comparison(d, np.zeros(n)).wilcoxon_p == pytest.approx(scipy.stats.wilcoxon(d).pvalue)


def test_ranks_see_through_rounding():
    a, b = np.array([3, 1, 9, 6, 4]), np.array([2, 2, 8, 4, 2])  # of ten examples; 0.3 - 0.2 is not 0.2 - 0.1
    assert paired_comparison(a, b).wilcoxon_p == paired_comparison(a / 10, b / 10).wilcoxon_p == 0.25


def test_holm_agrees_with_r():
    # R's multtest and p.adjust(p, "holm"), as in statsmodels' tests.
    p = [
        0.838541367553, 0.642193923795, 0.680845947633, 0.967833824309, 0.71626938238, 0.177096952723,
        5.23656777208e-05, 0.0202732688798, 0.00028140506198, 0.0149877310796,
    ]  # fmt: skip
    adjusted = [1, 1, 1, 1, 1, 1, 5.23656777208e-04, 0.141912882158600, 0.00253264555782, 0.119901848636800]
    assert holm(p) == pytest.approx(adjusted)


def test_holm_by_hand():
    # Four hypotheses: 4 × .005, 3 × .01, 2 × .03; then 1 × .04 is below the one before and is raised to it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert holm([0.01, None]) == (pytest.approx(0.02), None)
    assert holm([]) == ()
    with pytest.raises(DataError, match=r"p value 1\.5"):
        holm([1.5])


def test_holm_keeps_its_promise_where_plain_tests_do_not():
    p = np.random.default_rng(0).random((4000, 4))
    adjusted = np.array([holm(row) for row in p])
    assert (p < 0.05).any(axis=1).mean() > 0.15
    assert (adjusted < 0.05).any(axis=1).mean() < 0.06


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9), st.lists(st.integers(-4, 4), min_size=1, max_size=9))
def test_probability_of_improvement_is_the_normalised_mann_whitney_u(a, b):
    u = scipy.stats.mannwhitneyu(a, b).statistic
    assert probability_of_improvement(a, b) == pytest.approx(u / (len(a) * len(b)))


def test_probability_of_improvement_ignores_pairs_and_takes_divergence_as_worst():
    a, b = [0.51, 0.61, 0.71, 0.81], [0.5, 0.6, 0.7, 0.8]
    assert paired_comparison(a, b).improved == 1
    assert probability_of_improvement(a, b) == 10 / 16
    assert probability_of_improvement([float("-inf"), 0.9], [0.1, 0.2, 0.3]) == 0.5
    with pytest.raises(DataError, match="at least one of each"):
        probability_of_improvement([], b)


@given(st.lists(st.floats(-10, 10), min_size=3, max_size=12), st.integers(0, 3))
def test_agrees_with_scipy_and_is_antisymmetric(values, seed):
    b = np.random.default_rng(seed).normal(size=len(values))
    c, mirrored = paired_comparison(values, b), paired_comparison(b, values)
    test = scipy.stats.ttest_rel(values, b)
    assert c.t_p == pytest.approx(test.pvalue, rel=1e-6, abs=1e-12)
    assert c.t_interval == pytest.approx(tuple(test.confidence_interval(0.95)), rel=1e-9, abs=1e-9)
    assert (verdict(c) in {"helps", "hurts"}) == (test.pvalue < 0.05)
    assert c.t_interval is not None
    assert mirrored.t_interval is not None
    assert mirrored.mean == -c.mean
    assert mirrored.t_interval == pytest.approx((-c.t_interval[1], -c.t_interval[0]))
    assert mirrored.wilcoxon_p == c.wilcoxon_p
    assert mirrored.improved == pytest.approx(1 - c.improved)


def test_bootstrap_interval_is_seeded_and_holds_the_mean():
    a, b = [0.81, 0.84, 0.79, 0.83, 0.86], [0.80, 0.80, 0.80, 0.81, 0.82]
    c = paired_comparison(a, b)
    assert c == paired_comparison(a, b)
    assert c.bca_interval is not None
    assert c.bca_interval[0] < c.mean < c.bca_interval[1]


def test_detectable_difference_has_the_power_it_claims():
    rng = np.random.default_rng(0)
    d = rng.normal(0, 0.02, size=6)
    delta = paired_comparison(d, np.zeros(6)).detectable
    assert delta is not None
    repeats = rng.normal(delta, d.std(ddof=1), size=(20_000, 6))
    found = scipy.stats.ttest_1samp(repeats, 0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.015)


@pytest.mark.parametrize("n", [3, 5])
def test_t_covers_as_promised_where_the_bootstrap_does_not(n):
    draws = np.random.default_rng(n).normal(size=(600, n))
    comparisons = [paired_comparison(row, np.zeros(n)) for row in draws[:200]]
    bca = [c.bca_interval[0] <= 0 <= c.bca_interval[1] for c in comparisons if c.bca_interval]
    t = [i[0] <= 0 <= i[1] for i in (summarise(row).interval for row in draws) if i]
    assert len(bca) == 200
    assert len(t) == 600
    assert 0.92 < np.mean(t) < 0.975
    assert np.mean(bca) < 0.91


def test_summary_of_an_arm():
    s = summarise([0.5, 0.6, 0.7, 0.8, 0.9])
    assert (s.n, s.mean, s.median, s.maximum) == (5, pytest.approx(0.7), 0.7, 0.9)
    assert s.quartiles == (0.6, pytest.approx(0.8))
    half = 2.776445 * np.std([0.5, 0.6, 0.7, 0.8, 0.9], ddof=1) / 5**0.5
    assert s.interval == pytest.approx((0.7 - half, 0.7 + half), abs=1e-6)
    assert summarise([0.5, 0.5, 0.5]).interval is None
    assert summarise([0.5]).interval is None


@pytest.mark.parametrize("n", [1, 2])
def test_fewer_than_three_pairs_have_no_interval_and_say_so(n):
    c = paired_comparison([0.9] * n, [0.1] * n)
    assert (c.t_interval, c.bca_interval, c.detectable) == (None, None, None)
    assert "at least 3 seeds" in c.notes[0]
    assert verdict(c) == "undecided at this n"


@pytest.mark.parametrize(("a", "p"), [([0.7, 0.7, 0.7, 0.7], None), ([0.8, 0.9, 1.0, 1.1], 0.125)])
def test_equal_differences_decide_nothing(a, p):
    b = [0.7, 0.7, 0.7, 0.7] if p is None else [0.7, 0.8, 0.9, 1.0]
    c = paired_comparison(a, b)
    assert c.t_interval is None
    assert c.wilcoxon_p == p
    assert c.improved == (0.5 if p is None else 1)
    assert any("no spread" in note for note in c.notes)
    assert verdict(c, margin=1.0) == "undecided at this n"


def test_small_samples_are_noted():
    def notes(n):
        return " ".join(paired_comparison(np.arange(1, n + 1) * 0.1, np.zeros(n)).notes)

    assert "cannot give p < 0.05" in notes(5)
    assert "cannot give p < 0.05" not in notes(6)
    with_a_tie = paired_comparison(np.arange(6) * 0.1, np.zeros(6))
    assert with_a_tie.wilcoxon_p == 0.0625
    assert "With 6 pairs, 5 of which differ, the signed-rank test cannot give p < 0.05." in with_a_tie.notes
    assert "roughly normal" in notes(9)
    assert notes(10) == ""


def test_verdict_claims_equivalence_only_within_a_margin():
    c = paired_comparison([0.801, 0.799, 0.802, 0.800, 0.798], [0.8] * 5)
    assert verdict(c) == "undecided at this n"
    assert verdict(c, margin=0.01) == "no difference within ±0.01"
    assert verdict(c, margin=0.001) == "undecided at this n"
    small_but_sure = paired_comparison([0.8011, 0.8010, 0.8012, 0.8011, 0.8010], [0.8] * 5)
    assert verdict(small_but_sure, margin=0.01) == "helps"


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        ([], [], "at least one number"),
        ([1.0, 2.0], [1.0], "one pair per seed"),
        ([1.0, float("nan")], [1.0, 1.0], "diverged runs"),
    ],
)
def test_what_cannot_be_compared_is_refused(a, b, words):
    with pytest.raises(DataError, match=words):
        paired_comparison(a, b)


def test_confidence_must_be_a_share():
    with pytest.raises(DataError, match="between 0 and 1"):
        paired_comparison(SLEEP_1, SLEEP_2, confidence=95)
