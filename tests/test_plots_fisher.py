"""The figures of profiles and fidelity show the numbers they were given."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import language_model
from hypothesis import given, settings
from hypothesis import strategies as st
from random_profiles import random_profile
from samples_of_results import profile

from guided_dropout.errors import ArtefactError
from guided_dropout.fidelity.result import Cell, Fidelity, Order
from guided_dropout.fisher.spectrum import spectrum
from guided_dropout.plots.figures import figure_svg
from guided_dropout.plots.fisher import draw_fidelity, draw_layers, draw_lorenz, draw_spectrum, lorenz_curve
from guided_dropout.schedule.kinds import groups


@pytest.fixture(scope="module")
def bert():
    return random_profile(language_model("bert"))


def words(figure):
    figure.draw_without_rendering()
    return " ".join(t.get_text() for t in figure.findobj(lambda a: hasattr(a, "get_text")))


def exact_gini(values):
    """Mean absolute difference of all pairs over twice the mean."""
    x = np.asarray(values, dtype=np.float64)
    return np.abs(x[:, None] - x[None]).mean() / (2 * x.mean())


@settings(deadline=None, max_examples=30)
@given(st.lists(st.sampled_from([0.0, 1.0]) | st.floats(1e-12, 1e3), min_size=2, max_size=60))
def test_gini_is_that_of_all_pairs(values):
    if not any(values):
        return
    held = torch.tensor(values, dtype=torch.float64)
    s = spectrum(replace(profile(), diagonal={"w": held}, tensor_means={"w": float(held.mean())}))
    assert s.gini == pytest.approx(exact_gini(values), abs=5e-3)


def test_the_lorenz_curve_is_that_of_sorting():
    p = profile()
    values = torch.cat([t.flatten() for t in p.diagonal.values()]).double().sort().values.numpy()
    x, y = lorenz_curve(spectrum(p))
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert (np.diff(x) >= 0).all()
    assert (np.diff(y) >= 0).all()
    want = np.interp(x, np.linspace(0, 1, len(values) + 1), np.append(0, values.cumsum()) / values.sum())
    np.testing.assert_allclose(y, want, atol=5e-3)


def test_spectrum_draws_each_profile_on_both_kinds_of_axes():
    a, b = profile(), replace(profile(), diagonal={n: 4 * t for n, t in profile().diagonal.items()})
    figure = draw_spectrum({"first": a, "second": b})
    linear, log = figure.axes
    assert (linear.get_xscale(), log.get_xscale(), log.get_yscale()) == ("linear", "log", "log")
    lines = [line for line in log.lines if not line.get_label().startswith("_")]
    assert [line.get_label() for line in lines] == ["first", "second"]
    assert lines[1].get_ydata()[0] == pytest.approx(4 * lines[0].get_ydata()[0])
    assert max(len(line.get_xdata()) for line in log.lines) <= 4097
    assert "nats²" in words(figure)
    one, other = draw_spectrum({"first": a, "second": b}, normalise=True).axes[1].lines[:2]
    np.testing.assert_allclose(one.get_ydata(), other.get_ydata(), rtol=1e-5)


@pytest.mark.parametrize("names", [("_first", "second"), ("_a", "_b"), ("$x_$", "b$ {"), ("_$x$ ^{", "c")])
def test_any_label_stands_in_the_legend_as_it_is(names, bert):
    profiles = {name: replace(bert, diagonal={n: t + 1.0 for n, t in bert.diagonal.items()}) for name in names}
    spectra, lorenz, means = draw_spectrum(profiles), draw_lorenz(profiles), draw_layers(profiles, measure="mean")
    legends = [spectra.axes[1].get_legend(), lorenz.axes[1].get_legend(), means.legends[0]]
    draw_layers(profiles).draw_without_rendering()
    for figure, legend in zip((spectra, lorenz, means), legends, strict=True):
        figure.draw_without_rendering()
        shown = [text.get_text().strip().replace("\\$", "$") for text in legend.get_texts()]
        assert [text.partition(": Gini")[0] for text in shown[:2]] == list(names)


def test_lorenz_says_what_the_top_holds_and_the_gini():
    p = profile()
    said = words(draw_lorenz({"demo": p}))
    assert f"1 % hold {100 * spectrum(p).top_share(0.01):.0f} %" in said
    assert f"Gini {spectrum(p).gini:.3f}" in said
    assert "all parameters equal" in said
    assert "second: Gini" in words(draw_lorenz({"demo": p, "second": p}))


def test_shares_of_the_layers_add_up(bert):
    figure = draw_layers({"bert": bert})
    (ax,) = figure.axes
    heights = np.array([bar.get_height() for bar in ax.patches])
    assert heights.sum() == pytest.approx(1)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["emb", "0", "1", "head"]
    found = groups(bert)
    whole = sum(g.total for g in found)
    of_layer = sum(g.total for g in found if g.place.layer == 1) / whole
    assert sum(b.get_height() for b in ax.patches if round(b.get_x() + 0.4) == 2) == pytest.approx(of_layer)
    assert {"embedding", "attention", "intermediate", "output", "norm", "head"} <= set(words(figure).split())
    by_size = draw_layers({"bert": bert}, by_size=True).axes[0]
    totals = [sum(b.get_height() for b in by_size.patches if round(b.get_x() + 0.4) == x) for x in range(4)]
    assert totals == sorted(totals, reverse=True)


def test_means_have_a_panel_for_each_kind(bert):
    other = replace(bert, tensor_means={n: 3 * m for n, m in bert.tensor_means.items()})
    figure = draw_layers({"one": bert, "two": other}, measure="mean")
    panels = {ax.get_title(loc="left"): ax for ax in figure.axes if ax.get_visible()}
    assert list(panels) == ["embedding", "attention", "intermediate", "output", "norm", "head"]
    bars = [bar.get_height() for bar in panels["attention"].patches]
    want = [g.mean for g in groups(bert) if g.place.kind == "attention"]
    assert bars == pytest.approx([*want, *(3 * m for m in want)])
    normalised = draw_layers({"one": bert, "two": other}, measure="mean", normalise=True)
    heights = [bar.get_height() for bar in normalised.axes[1].patches]
    assert heights[:2] == pytest.approx(heights[2:])


def test_two_stacks_are_named():
    figure = draw_layers({"t5": random_profile(language_model("t5"))})
    labels = [t.get_text() for t in figure.axes[0].get_xticklabels()]
    assert labels == ["emb", "0\nencoder", "1", "0\ndecoder", "1", "head"]


def test_means_stand_in_the_order_of_depth_too():
    figure = draw_layers({"t5": random_profile(language_model("t5"))}, measure="mean")
    named = [[t.get_text() for t in ax.get_xticklabels()] for ax in figure.axes]
    labels = next(filter(None, named))
    assert labels == ["emb", "0\nencoder", "1", "0\ndecoder", "1", "head"]


def test_layers_need_means_alone(bert):
    means = replace(bert, diagonal={}, shapes=bert.shapes)
    assert len(draw_layers({"a": means, "b": means}).axes) == 2
    with pytest.raises(ArtefactError, match="holds tensor means only"):
        draw_spectrum({"a": means})
    with pytest.raises(ArtefactError, match="measure 'median'"):
        draw_layers({"a": bert}, measure="median")
    with pytest.raises(
        ArtefactError, match=r"normalise with the measure 'share', .* expected it with the measure 'mean'"
    ):
        draw_layers({"a": bert}, normalise=True)


def made_up(**changes):
    def cells(top):
        return tuple(
            Cell(f, n, top, {"overlap": [0.5, 0.7], "rms_error": [0.2, 0.4]}) for f, n in ((0.3, 30), (0.1, 10))
        )

    facts = {
        "cells": cells(0.05) + cells(0.01),
        "orders": (Order(0.3, 30, {"tau": [0.8, 0.9]}), Order(0.1, 10, {"tau": [0.6, None]})),
        "curve": {"samples": [1, 10, 50, 100], "mean": [0.3, 0.7, 0.96, 1], "lower": [0, 0.5, 0.95, 1],
                  "lowest": [-0.2, 0.4, 0.9, 1], "subsamples": 200},
        "bootstrap": {"mean": 0.9, "lower": 0.8, "replicates": 200},
        "recommended": 50, "tau": 0.95, "grouping": "owner", "num_samples": 100, "num_skipped": 0,
        "num_parameters": 1000, "sites": 7, "fractions": (0.3, 0.1), "tops": (0.05, 0.01), "draws": 2, "seed": 0,
        "model": {},
    }  # fmt: skip
    return Fidelity(**{**facts, **changes})


def test_fidelity_shows_the_curve_the_draws_and_the_number_recommended():
    figure = draw_fidelity(made_up())
    assert len(figure.axes) == 3
    schedule, overlap, errors = figure.axes
    assert list(schedule.lines[0].get_ydata()) == [0.3, 0.7, 0.96, 1]
    said = words(figure)
    assert "50 samples" in said
    assert "top 5 %" in said
    assert errors.get_yscale() == "log"
    assert list(overlap.lines[1].get_ydata()) == pytest.approx([0.6, 0.6])
    assert figure_svg(draw_fidelity(made_up())) == figure_svg(draw_fidelity(made_up()))


@given(recommended=st.integers(1, 100), smallest=st.integers(1, 30))
@settings(deadline=None, max_examples=10)
def test_the_number_recommended_is_in_the_picture(recommended, smallest):
    orders = (Order(0.3, smallest, {"tau": [0.8, 0.9]}),)
    figure = draw_fidelity(made_up(recommended=recommended, orders=orders, cells=()))
    figure.draw_without_rendering()
    (ax,) = figure.axes
    (label,) = (t for t in ax.texts if t.get_text() == f"{recommended} samples")
    low, high = ax.get_xlim()
    assert low < recommended < high
    box, panel = label.get_window_extent(), ax.get_window_extent()
    assert panel.x0 <= box.x0
    assert box.x1 <= panel.x1


def test_few_samples_are_named_on_the_axis_as_numbers_side_by_side():
    few = {"samples": [1, 2, 5, 12], "mean": [0.5, 0.7, 0.9, 1], "lower": [0.3, 0.6, 0.8, 1]}
    made = made_up()
    orders = tuple(replace(o, samples=n) for o, n in zip(made.orders, (6, 2), strict=False))
    result = replace(made, curve={**made.curve, **few}, orders=orders, num_samples=12, recommended=5, cells=())
    figure = draw_fidelity(result)
    figure.draw_without_rendering()
    axis = figure.axes[0].xaxis
    low, high = axis.get_view_interval()
    ticks = [t for minor in (False, True) for t in axis.get_ticklabels(minor=minor) if t.get_text()]
    shown = sorted((t for t in ticks if low <= t.get_position()[0] <= high), key=lambda t: t.get_position())
    assert [t.get_text() for t in shown] == ["2", "5", "10"]
    boxes = [t.get_window_extent() for t in shown]
    assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))


def test_fidelity_of_schedules_or_parameters_alone():
    assert len(draw_fidelity(made_up(cells=())).axes) == 1
    assert len(draw_fidelity(made_up(curve=None, orders=())).axes) == 2
    with pytest.raises(ArtefactError, match="nothing to draw"):
        draw_fidelity(made_up(cells=(), curve=None, orders=()))
