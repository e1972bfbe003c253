from __future__ import annotations

import math
from decimal import Decimal
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guided_dropout.errors import ScheduleError
from guided_dropout.schedule.shapes import (
    SHAPES,
    check_rate,
    paper_code_rates,
    place_rates,
    rates_from_scores,
    shape_name,
    with_mean,
)

NAMED = [name for name in SHAPES if name != "paper_code"] + ["step:2", "step:7", "exponential:0.01", "exponential:40"]
shapes = st.sampled_from(NAMED)
positive = st.floats(0, 1e300)
score_maps = st.dictionaries(st.text(min_size=1, max_size=5), positive, min_size=1, max_size=40)
few_values = st.dictionaries(st.text(min_size=1, max_size=5), st.sampled_from([0.0, 1e-9, 1e-3, 2.0]), min_size=1)
bounds = st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)).map(sorted)


def oracle(scores: dict[str, float], upper: float, lower: float, shape: str) -> dict[str, float]:
    """Each formula written out site by site; equal scores share the mean of the rates at their places."""
    name, _, number = shape.partition(":")
    ranked = sorted(scores, key=lambda path: (scores[path], path))
    size, least = len(ranked), [s for s in scores.values() if s > 0]
    places = []
    for k, path in enumerate(ranked):
        r = k / (size - 1) if size > 1 else 0.0
        if name == "linear":
            fallen = r
        elif name == "cosine":
            fallen = (1 - math.cos(math.pi * r)) / 2
        elif name == "exponential":
            a = float(number or 3)
            fallen = math.expm1(-a * r) / math.expm1(-a)
        elif name == "step":
            n = min(int(number or 4), size)
            fallen = math.floor((k + 0.5) * n / size) / (n - 1) if n > 1 else 0.0
        else:
            low, high = (math.log(min(least)), math.log(max(least))) if least else (0, 0)
            s = scores[path]
            if len(set(scores.values())) == 1:
                fallen = 0.5 if size > 1 else 0.0
            elif low == high:
                fallen = float(s > 0) if min(scores.values()) == 0 else 0.5
            else:
                fallen = (math.log(s) - low) / (high - low) if s > 0 else 0.0
        places.append(upper - fallen * (upper - lower))
    at = dict(zip(ranked, places, strict=True))
    return {path: float(np.mean([at[q] for q in scores if scores[q] == s])) for path, s in scores.items()}


@given(scores=st.one_of(score_maps, few_values), bounds=bounds, shape=shapes)
def test_each_shape_is_its_formula(scores: dict[str, float], bounds: list[float], shape: str) -> None:
    lower, upper = bounds
    rates = rates_from_scores(scores, upper=upper, lower=lower, shape=shape)
    assert list(rates) == list(scores)
    assert rates == pytest.approx(oracle(scores, upper, lower, shape), abs=1e-9)


@given(scores=st.one_of(score_maps, few_values), bounds=bounds, shape=shapes)
def test_rates_fall_as_scores_rise_and_reach_both_ends(
    scores: dict[str, float], bounds: list[float], shape: str
) -> None:
    lower, upper = bounds
    rates = rates_from_scores(scores, upper=upper, lower=lower, shape=shape)
    assert all(lower <= rate <= upper for rate in rates.values())
    ranked = sorted(scores, key=scores.__getitem__)
    for a, b in pairwise(ranked):
        assert rates[a] == rates[b] if scores[a] == scores[b] else rates[a] >= rates[b]
    values = sorted(scores.values())
    logs_differ = shape != "proportional" or values[0] == 0 or math.log(values[0]) < math.log(values[-1])
    if len(values) > 1 and values[0] < values[1] and logs_differ:
        assert rates[ranked[0]] == upper
    if len(values) > 1 and values[-2] < values[-1] and logs_differ:
        assert rates[ranked[-1]] == lower
    if len(values) == 1:
        assert set(rates.values()) == {upper}


@given(scores=few_values, bounds=bounds, shape=shapes, data=st.data())
def test_permuting_the_scores_permutes_the_rates(
    scores: dict[str, float], bounds: list[float], shape: str, data: st.DataObject
) -> None:
    lower, upper = bounds
    rates = rates_from_scores(scores, upper=upper, lower=lower, shape=shape)
    moved = dict(zip(scores, data.draw(st.permutations(list(scores))), strict=True))
    permuted = {path: scores[moved[path]] for path in scores}
    assert rates_from_scores(permuted, upper=upper, lower=lower, shape=shape) == {p: rates[moved[p]] for p in scores}


@given(scores=few_values, bounds=bounds)
def test_ties_do_not_change_the_mean(scores: dict[str, float], bounds: list[float]) -> None:
    lower, upper = bounds
    rates = rates_from_scores(scores, upper=upper, lower=lower)
    if len(scores) > 1:
        assert math.fsum(rates.values()) / len(rates) == pytest.approx((upper + lower) / 2)
    flat = rates_from_scores(dict.fromkeys(scores, 1.0), upper=upper, lower=lower, shape="step")
    assert len(set(flat.values())) == 1


def test_the_formula_of_the_paper() -> None:
    rates = rates_from_scores({"a": 3.0, "b": 1.0, "c": 2.0, "d": 9.0, "e": 4.0}, upper=0.1, lower=0.02)
    assert rates == pytest.approx({"b": 0.1, "c": 0.08, "a": 0.06, "e": 0.04, "d": 0.02}, abs=1e-15)


def test_equal_scores_get_equal_rates_and_a_single_site_gets_upper() -> None:
    assert rates_from_scores({"b": 1.0, "a": 1.0, "c": 2.0}, upper=0.4, lower=0.0) == pytest.approx(
        {"b": 0.3, "a": 0.3, "c": 0.0}
    )
    for shape in NAMED:
        assert rates_from_scores({"a": 1.0}, upper=0.5, lower=0.1, shape=shape) == {"a": 0.5}


def test_zero_scores_have_no_logarithm_and_get_upper() -> None:
    scores = {"zero": 0.0, "low": 1e-4, "middle": 1e-3, "high": 1e-2}
    rates = rates_from_scores(scores, upper=0.2, lower=0.1, shape="proportional")
    assert rates == pytest.approx({"zero": 0.2, "low": 0.2, "middle": 0.15, "high": 0.1})
    with pytest.raises(ScheduleError, match=r"score -1 has no logarithm; expected 0 or more"):
        rates_from_scores({"a": -1.0, "b": 1.0}, shape="proportional")


@given(scores=score_maps, mean=st.floats(0.001, 0.999), shape=shapes)
def test_a_mean_rate_is_met_by_one_factor_or_refused(scores: dict[str, float], mean: float, shape: str) -> None:
    plain = rates_from_scores(scores, upper=0.1, lower=0.02, shape=shape)
    highest = mean / (math.fsum(plain.values()) / len(plain)) * max(plain.values())
    if highest > 1 + 1e-9:
        with pytest.raises(ScheduleError, match=r"(?s)mean rate .* would need a rate of .*choose a mean rate below"):
            rates_from_scores(scores, upper=0.1, lower=0.02, shape=shape, mean_rate=mean)
    elif highest < 1 - 1e-9:
        rates = rates_from_scores(scores, upper=0.1, lower=0.02, shape=shape, mean_rate=mean)
        assert math.fsum(rates.values()) / len(rates) == pytest.approx(mean, rel=1e-12)
        assert [rates[p] / plain[p] for p in rates] == pytest.approx([highest / max(plain.values())] * len(rates))


def test_a_mean_of_nothing_but_zeros() -> None:
    assert with_mean({"a": 0.0, "b": 0.0}, 0.0) == {"a": 0.0, "b": 0.0}
    assert rates_from_scores({}, mean_rate=0.1) == {}
    with pytest.raises(ScheduleError, match=r"all 0 have no multiple of mean 0.1"):
        with_mean({"a": 0.0, "b": 0.0}, 0.1)
    with pytest.raises(ScheduleError, match=r"mean_rate is 1; expected a number in \[0, 1\)"):
        with_mean({"a": 0.1}, 1)


def test_the_rates_of_the_papers_script() -> None:
    rates = paper_code_rates(37)
    assert (rates[0], rates[-1]) == (0.099, 0.0)
    assert math.fsum(rates) / 37 == pytest.approx(0.0495, abs=1e-15)
    assert rates == [float(Decimal("0.099") - k * Decimal("0.00275")) for k in range(37)]
    order = np.random.default_rng(0).permutation(37)
    placed = rates_from_scores({f"site {k}": float(order[k]) ** 2 for k in range(37)}, shape="paper_code")
    assert [placed[f"site {k}"] for k in np.argsort(order)] == rates
    scores = {str(k): float(k) for k in range(19)}
    with pytest.raises(ScheduleError, match=r"paper_code for 19 sites; expected 37.*linear with upper 0.099"):
        rates_from_scores(scores, shape="paper_code")
    with pytest.raises(ScheduleError, match=r"paper_code with upper 0.2 and lower 0; expected the paper's 0.1 and 0"):
        paper_code_rates(37, upper=0.2)


def test_a_function_is_a_shape() -> None:
    def squares(scores: np.ndarray) -> list[float]:
        assert scores.tolist() == [1.0, 2.0, 4.0]
        return [(s - 1) ** 2 / 9 for s in scores]

    rates = rates_from_scores({"a": 4.0, "b": 1.0, "c": 2.0}, upper=0.9, lower=0.0, shape=squares)
    assert rates == pytest.approx({"a": 0.0, "b": 0.9, "c": 0.8})
    assert shape_name(squares) == "custom:squares"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda scores: [0.0], r"falls of shape \[1\] for 3 scores"),
        (lambda scores: [0.1, 0.05, 0.0], "never decrease"),
        (lambda scores: [0.0, 1.0, 1.5], "expected falls from 0"),
        (lambda scores: [0.0, math.nan, 1.0], "expected falls from 0"),
    ],
)
def test_a_function_that_is_no_shape_is_refused(function: object, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        rates_from_scores({"a": 4.0, "b": 1.0, "c": 2.0}, shape=function)


def test_names_carry_their_number() -> None:
    assert [shape_name(s) for s in ("linear", "step", "step:3", "exponential", "paper_code")] == [
        "linear", "step:4", "step:3", "exponential:3", "paper_code",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"upper": 1.0}, r"upper is 1.0; expected a number in \[0, 1\)"),
        ({"lower": -0.1}, "lower is -0.1"),
        ({"upper": math.nan}, "upper is nan"),
        ({"upper": math.inf}, "upper is inf"),
        ({"upper": True}, "upper is True"),
        ({"upper": 0.1, "lower": 0.2}, "lower rate 0.2 is above upper rate 0.1"),
        ({"shape": "liner"}, "unknown shape 'liner'.*did you mean 'linear'"),
        ({"shape": "linear:2"}, "'linear:2' has a number, which linear does not take"),
        ({"shape": "step:two"}, "'step:two'; expected a number after the colon"),
        ({"shape": "step:1"}, "1 groups of shape step; expected a whole number from 2"),
        ({"shape": "step:2.5"}, "2.5 groups of shape step"),
        ({"shape": "step:inf"}, "inf groups of shape step"),
        ({"shape": "exponential:0"}, "decay 0 of shape exponential; expected a number above 0"),
        ({"shape": "exponential:nan"}, "decay nan"),
    ],
)
def test_impossible_rates_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        rates_from_scores({"a": 1.0, "b": 2.0}, **{"upper": 0.1, "lower": 0.0, **options})


def test_a_score_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ScheduleError, match="score of b is nan"):
        rates_from_scores({"a": 1.0, "b": math.nan})


def test_rates_are_placed_by_score() -> None:
    assert place_rates({"x": 3.0, "y": 1.0, "z": 2.0}, [0.3, 0.2, 0.1]) == {"x": 0.1, "y": 0.3, "z": 0.2}
    assert rates_from_scores({}) == {}


@pytest.mark.parametrize(
    ("rate", "found"), [(1.0, "1.0"), ("a", "'a'"), (None, "None"), ({"x": 0.1}, "a dict"), ([0.1] * 99, "a list")]
)
def test_a_rate_that_is_none_is_told_by_its_value_or_its_kind(rate: object, found: str) -> None:
    with pytest.raises(ScheduleError, match=rf"dropout rate of site is {found}; expected a number in \[0, 1\)"):
        check_rate("site", rate)
