"""Runs without a metric favour no arm: they are counted, and no verdict rests on their absence."""

import numpy as np
import pytest
from samples_of_results import run

from guided_dropout.bench.arms import compare_arms, group_by_arm
from guided_dropout.results import Seeds
from guided_dropout.stats import verdict

BASE = [0.70, 0.71, 0.72, 0.705, 0.715, 0.725, 0.695, 0.712]


def compare(a, b, failed=None):
    """Metrics by seed, None where a run diverged; and the seeds of failed runs by arm."""
    results = [run(arm, s, v) for arm, values in (("guided", a), ("dropout", b)) for s, v in values.items()]
    failed = {arm: [Seeds.derive(s) for s in seeds] for arm, seeds in (failed or {}).items()}
    arms = {arm.name: arm for arm in group_by_arm(results, failed=failed)}
    return compare_arms(arms["guided"], arms["dropout"])


def by_seed(values):
    return dict(enumerate(values))


def test_an_arm_does_not_gain_by_losing_its_bad_runs():
    better = [x + 0.02 + 0.001 * i for i, x in enumerate(BASE)]
    whole = compare(by_seed(better), by_seed(BASE))
    assert (whole.verdict(), whole.with_lost, whole.lost, whole.better) == ("helps", None, (0, 0), 1)
    for kind in ("diverged", "failed"):
        kept = {s: v for s, v in by_seed(better).items() if s > 2}
        lost = dict.fromkeys(range(3)) if kind == "diverged" else {}
        c = compare(kept | lost, by_seed(BASE), {} if kind == "diverged" else {"guided": [0, 1, 2]})
        assert verdict(c.statistics) == "helps"
        assert c.verdict() == "undecided at this n"
        assert (c.lost, c.left_out, c.statistics.n, c.with_lost.n) == ((3, 0), 3, 5, 8)
        assert min(c.with_lost.differences) == pytest.approx(-0.72)


def test_runs_that_diverge_count_no_better_than_such_that_learn_nothing():
    """The worst that was seen is no bound: what diverges is what would have been worse."""
    base = [0.5 + 0.005 * (s % 4) for s in range(20)]
    better = {s: x + 0.02 + 0.002 * (s % 3) for s, x in enumerate(base)}
    for bad in (0.0, None):
        assert compare(better | dict.fromkeys(range(3), bad), by_seed(base)).verdict() == "undecided at this n"
    worse = {s: x - 0.02 - 0.002 * (s % 3) for s, x in enumerate(base)}
    for bad in (0.0, None):
        assert compare(worse, by_seed(base) | dict.fromkeys(range(3), bad)).verdict() == "undecided at this n"


@pytest.mark.parametrize("tilt", [1e-5, 0.0, -1e-5])
@pytest.mark.parametrize("lost", ["guided", "dropout"])
def test_no_difference_is_not_claimed_of_an_arm_that_loses_a_fifth_of_its_runs(lost, tilt):
    """Whichever is ahead by a hair: that must not decide what stands in for them."""
    base = {s: BASE[s % 8] for s in range(20)}
    other = {s: x + tilt + 0.001 * (-1) ** s for s, x in base.items()}
    assert compare(other, base).verdict(margin=0.02) == "no difference within ±0.02"
    few = dict.fromkeys(range(4))
    c = compare(other | few, base) if lost == "guided" else compare(other, base | few)
    assert verdict(c.statistics, margin=0.02) == "no difference within ±0.02"
    assert c.verdict(margin=0.02) == "undecided at this n"


def test_the_other_arms_lost_runs_do_not_blur_what_is_found_without_them():
    better = {s: x + 0.02 + 0.001 * s for s, x in enumerate(BASE)}
    assert compare(better, by_seed(BASE) | {0: None}).verdict() == "helps"


def test_nor_does_it_lose_by_the_other_arms_failures():
    worse = {s: x - 0.02 - 0.001 * s for s, x in enumerate(BASE)}
    c = compare(worse, {s: (None if s < 3 else x) for s, x in enumerate(BASE)})
    assert verdict(c.statistics) == "hurts"
    assert c.verdict() == "undecided at this n"
    assert c.lost == (0, 3)


def test_a_verdict_that_lost_runs_could_not_change_stands():
    worse = {s: x - 0.05 - 0.001 * s for s, x in enumerate(BASE)}
    c = compare(worse | {0: None}, by_seed(BASE))
    assert c.verdict() == "hurts"
    assert c.with_lost.n == 8


def test_a_seed_that_both_arms_lose_says_nothing():
    c = compare(by_seed([None, *BASE[1:]]), by_seed([None, *BASE[1:]]))
    assert c.with_lost is None
    assert c.lost == (1, 1)
    assert c.better == 0.5


def test_divergence_ranks_below_any_metric_and_failure_nowhere():
    c = compare({0: None, 1: 0.9, 2: 0.9}, {0: 0.1, 1: 0.5, 2: 0.5, 3: 0.5})
    assert c.better == pytest.approx(2 / 3)
    assert c.probability == pytest.approx(8 / 12)
    c = compare({1: 0.9, 2: 0.9}, {0: 0.1, 1: 0.5, 2: 0.5, 3: 0.5}, {"guided": [0]})
    assert c.better == 1
    assert c.probability == 1


def test_a_run_that_is_not_made_yet_is_not_lost():
    c = compare({0: 0.8, 1: 0.8}, {0: 0.7, 1: 0.7, 2: 0.7})
    assert (c.lost, c.left_out, c.with_lost) == ((0, 0), 1, None)


def test_an_arm_whose_runs_are_all_lost():
    c = compare(by_seed([None] * 5), by_seed(BASE[:5]))
    assert c.statistics is None
    assert c.verdict() == "undecided at this n"
    assert (c.better, c.probability) == (0, 0)
    (dropout, guided) = group_by_arm(
        [run("dropout", s, v) for s, v in enumerate(BASE[:5])], failed={"guided": [Seeds.derive(s) for s in range(5)]}
    )
    c = compare_arms(guided, dropout)
    assert (c.better, c.probability, c.lost) == (None, None, (5, 0))
    assert guided.counts == {"ok": 0, "collapsed": 0, "diverged": 0, "failed": 5}


def test_selective_divergence_makes_no_claims():
    """Two arms that do not differ, one of which diverges wherever it would have done badly."""
    rng = np.random.default_rng(0)
    naive, claimed = 0, 0
    for _ in range(60):
        seeds = rng.normal(0.7, 0.02, size=10)
        a, b = seeds + rng.normal(0, 0.01, 10), seeds + rng.normal(0, 0.01, 10)
        c = compare({s: (x if x > y else None) for s, (x, y) in enumerate(zip(a, b, strict=True))}, by_seed(b))
        naive += c.statistics is not None and verdict(c.statistics) == "helps"
        claimed += c.verdict() == "helps"
    assert naive > 30
    assert claimed <= 60 * 0.05
