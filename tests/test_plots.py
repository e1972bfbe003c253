"""The figures show the numbers they were given, and the spectrum is that of the sorted values."""

from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from samples_of_results import profile, run, site

from guided_dropout.errors import ArtefactError
from guided_dropout.fisher.spectrum import spectrum
from guided_dropout.plots.figures import (
    figure_of,
    figure_svg,
    plot_layers,
    plot_paired,
    plot_schedule,
    plot_shapes,
    plot_spectrum,
    save_figure,
)
from guided_dropout.schedule import DropoutSchedule, rates_from_scores


def texts(ax):
    figure = figure_of(ax)
    figure.draw_without_rendering()
    return " ".join(t.get_text() for t in figure.findobj(lambda a: hasattr(a, "get_text")))


@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.3, 1.0])
def test_spectrum_agrees_with_sorting(fraction):
    p = profile()
    s = spectrum(p)
    values = torch.cat([t.flatten() for t in p.diagonal.values()]).double().sort(descending=True).values.numpy()
    exact = values[: round(fraction * len(values))].sum() / values.sum()
    assert s.top_share(fraction) == pytest.approx(exact, rel=5e-3)
    assert s.num_parameters == len(values)
    assert s.num_zeros == (values == 0).sum() > 0
    assert s.counts[-1] == len(values) - s.num_zeros
    assert s.values[0] == pytest.approx(values[0], rel=0.01)
    assert (np.diff(s.values) < 0).all()


def test_spectrum_of_equal_values():
    s = spectrum(replace(profile(), diagonal={"w": torch.full((10, 10), 0.25)}, tensor_means={"w": 0.25}))
    assert s.top_share(0.3) == pytest.approx(0.3)
    assert s.values == pytest.approx([0.25])


def test_spectrum_without_information_is_an_error():
    with pytest.raises(ArtefactError, match="no Fisher value above zero among 4"):
        spectrum(replace(profile(), diagonal={"w": torch.zeros(2, 2)}, tensor_means={"w": 0.0}))


def test_plot_spectrum_says_what_the_top_holds():
    p = profile()
    ax = plot_spectrum(p)
    assert ax.get_xscale() == ax.get_yscale() == "log"
    assert f"holds {100 * spectrum(p).top_share(0.01):.0f} % of the total" in texts(ax)
    assert "exactly 0" in texts(ax)


def test_plot_layers_draws_scores_and_rates():
    table = [site("a.first", 1e-6, 0.1), site("a.second", 1e-4, 0.0, kind="attention"), site("head", None, None)]
    ax = plot_layers(table)
    ends = [bar.get_x() + bar.get_width() for bar in ax.patches]
    assert ends == pytest.approx([1e-6, 1e-4])
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a.first", "a.second", "head"]
    rates = next(other for other in figure_of(ax).axes if other is not ax)
    assert "dropout rate" in rates.get_xlabel()
    assert list(rates.lines[0].get_xdata()) == [0.1, 0.0, 0.1]
    assert "no score" in texts(ax)
    assert "attribute" not in texts(ax)


def test_a_score_of_0_is_one():
    ax = plot_layers([site("a.first", 1e-6, 0.1), site("a.second", 0.0, 0.1)])
    assert [text.get_text() for text in ax.texts] == ["0"]


def test_plot_layers_drops_what_all_paths_share():
    ax = plot_layers([site("bert.layer.0.dropout", 1.0, 0.1), site("bert.layer.1.dropout", 2.0, 0.0)])
    assert [t.get_text() for t in ax.get_yticklabels()] == ["0.dropout", "1.dropout"]


def schedule(paths):
    rates = {path: k / 100 for k, path in enumerate(paths)}
    return DropoutSchedule(
        rates, dict.fromkeys(rates), "table", "owner", 0.5, 0.0, {"backbone_prefix": "m."},
        kinds={path: "attention" if "self" in path else "module" for path in rates},
    )  # fmt: skip


def test_plot_schedule_draws_a_line_for_each_place_over_depth():
    ax = plot_schedule(schedule(["m.first", "m.h.0.self", "m.h.0.out", "m.h.1.self", "m.h.1.out"]))
    lines = {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}
    assert list(lines) == ["first (module)", "h.*.self (attention)", "h.*.out (module)"]
    assert list(lines["h.*.self (attention)"].get_xdata()) == [1, 3]
    assert list(lines["h.*.self (attention)"].get_ydata()) == [0.01, 0.03]
    assert list(ax.get_xticks()) == [1, 3]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "1"]
    assert "mean 0.02" in texts(ax)


def test_many_series_are_told_apart():
    ax = plot_schedule(schedule([f"m.place{k}" for k in range(30)]))
    looks = {(line.get_color(), line.get_marker()) for line in ax.lines if not line.get_label().startswith("_")}
    assert len(looks) == 30


def test_plot_shapes_draws_each_in_the_order_of_the_scores():
    scores = {"a": 3.0, "b": 1.0, "c": 20.0}
    ax = plot_shapes(scores, ["linear", "proportional"])
    for line in ax.lines:
        rates = rates_from_scores(scores, shape=line.get_label())
        assert list(line.get_ydata()) == [rates["b"], rates["a"], rates["c"]]


def test_a_figure_is_saved_as_its_ending_says(tmp_path):
    figure = figure_of(plot_shapes({"a": 1.0, "b": 2.0}))
    assert save_figure(figure, tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")
    assert save_figure(figure, tmp_path / "a.svg").read_text().startswith("<svg")
    assert save_figure(figure, tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(ArtefactError, match=r"cannot draw to .*a\.gif; expected a name that ends in \.png, \.svg or"):
        save_figure(figure, tmp_path / "a.gif")
    assert not (tmp_path / "a.gif").exists()


def test_plot_paired_joins_seeds_and_marks_means():
    results = [run("dropout", 0, 0.7), run("dropout", 1, 0.8), run("guided", 0, 0.9), run("guided", 1, None)]
    ax = plot_paired(results)
    lines = [line.get_ydata() for line in ax.lines]
    np.testing.assert_array_equal(lines, [[0.7, 0.9], [0.8, np.nan]])
    assert "0.750" in texts(ax)
    assert "0.900" in texts(ax)
    assert ax.get_ylabel() == "accuracy"


def test_given_axes_are_drawn_on():
    ax = Figure().add_subplot()
    assert plot_paired([run("dropout", 0, 0.5)], ax=ax) is ax


def test_svg_is_well_formed_self_contained_and_repeatable():
    first, second = (figure_svg(figure_of(plot_spectrum(profile()))) for _ in range(2))
    assert first == second
    assert ElementTree.fromstring(first).tag.endswith("svg")
    assert 'href="http' not in first
