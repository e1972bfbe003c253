"""The figures of an experiment show the numbers they were given, and no text lies on another."""

from unittest import mock

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from guided_dropout.plots.bench import ArmRuns, Curve, Effect, plot_curves, plot_forest, plot_runs
from guided_dropout.plots.figures import figure_svg


def drawn(figure):
    """The texts that are drawn, and the figure's renderer."""
    seen, draw = [], Text.draw

    def watched(self, renderer, *args, **options):
        seen.append(self)
        return draw(self, renderer, *args, **options)

    canvas = FigureCanvasAgg(figure)
    with mock.patch.object(Text, "draw", watched):
        canvas.draw()
    return [t for t in dict.fromkeys(seen) if t.get_text().strip() and t.get_visible()], canvas.get_renderer()


def texts(figure):
    return [t.get_text() for t in drawn(figure)[0]]


def overlapping(figure):
    """Texts that are cut off, and pairs that lie on each other, as they are drawn."""
    found, renderer = drawn(figure)
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in found]
    page = figure.bbox
    outside = [t for t, b in boxes if b.x0 < -1 or b.y0 < -1 or b.x1 > page.x1 + 1 or b.y1 > page.y1 + 1]
    return outside + [(a, b) for i, (a, x) in enumerate(boxes) for b, y in boxes[i + 1 :] if x.overlaps(y)]


def curve(label, *, band=False, fractions=(0.1, 0.25, 1.0)):
    means = [0.5 + 0.1 * f for f in fractions]
    return Curve(label, fractions, means, [(m - 0.02, m + 0.01) for m in means], band)


@pytest.mark.parametrize("fractions", [(0.1, 0.25, 1.0), tuple(n / 10 for n in range(1, 11))])
@pytest.mark.parametrize("number", [1, 2, 4, 8])
def test_curves_have_a_panel_a_task_and_a_line_an_arm(number, fractions):
    arms = ["guided", "dropout", "uniform", "shuffled"]
    panels = {f"task-{t}": [curve(a, band=a == "guided", fractions=fractions) for a in arms] for t in range(number)}
    figure = plot_curves(panels, dict.fromkeys(panels, "Matthews correlation"))
    assert len(figure.axes) == number
    for ax in figure.axes:
        assert [list(line.get_ydata()) for line in ax.lines] == [
            list(curve(a, fractions=fractions).means) for a in arms
        ]
        assert len({(line.get_color(), line.get_marker()) for line in ax.lines}) == len(arms)
        assert len(ax.collections) == 1
        low, high = (
            np.min(ax.collections[0].get_paths()[0].vertices, 0),
            np.max(ax.collections[0].get_paths()[0].vertices, 0),
        )
        assert (low[1], high[1]) == pytest.approx((min(curve("x").means) - 0.02, max(curve("x").means) + 0.01))
    assert {"Matthews correlation", "share of the training data", "guided", "100 %"} <= set(texts(figure))
    assert overlapping(figure) == []


def effect(label, mean, half, **changes):
    facts = {"kind": "same mean", "decided": abs(mean) > half, "differences": (mean - half, mean, mean + half)}
    interval = None if half is None else (mean - half, mean + half)
    return Effect(label=label, mean=mean, interval=interval, **{**facts, **changes})


def test_forest_has_a_row_for_each_task_and_control():
    tasks = {
        "cola": [effect("dropout", 0.03, 0.01, kind="standard"), effect("uniform", 0.001, 0.02)],
        "rte": [effect("dropout", -0.02, 0.01, kind="standard"), Effect("uniform", "same mean", None, None, False)],
    }
    figure = plot_forest({"10 %": tasks}, arm="guided", margin=0.01)
    (ax,) = figure.axes
    assert [t.get_text() for t in ax.get_yticklabels()] == ["cola", "dropout", "uniform", "rte", "dropout", "uniform"]
    points = {round(float(line.get_xdata()[0]), 6): line for line in ax.lines if len(line.get_xdata()) == 1}
    assert set(points) == {0.03, 0.001, -0.02}
    assert points[0.03].get_markerfacecolor() == points[0.03].get_color()
    assert points[0.001].get_markerfacecolor() == "white"
    assert "+0.0300  [+0.0200, +0.0400]" in texts(figure)
    assert "no pairs" in texts(figure)
    assert overlapping(figure) == []


def test_a_wild_interval_does_not_dwarf_the_others():
    tasks = {"cola": [effect(f"arm-{i}", 0.001 * i, 0.01) for i in range(6)] + [effect("wild", 0.0, 5.0)]}
    (ax,) = plot_forest({"10 %": tasks}, arm="guided").axes
    assert ax.get_xlim()[1] < 0.1
    assert [line.get_marker() for line in ax.lines].count("<") == 1


def test_forest_with_fractions_side_by_side():
    tasks = {
        t: [effect(c, 0.01, 0.02) for c in ("dropout", "uniform", "depth-linear")] for t in ("cola", "rte", "mrpc")
    }
    figure = plot_forest({f"{n} % of the data": tasks for n in (100, 50, 25, 10)}, arm="guided")
    assert len(figure.axes) == 4
    assert overlapping(figure) == []


def test_runs_show_each_run_and_each_difference():
    rng = np.random.default_rng(0)
    arms = [
        ArmRuns("guided", list(rng.normal(0.6, 0.01, 8)), [], 0, None),
        ArmRuns("dropout", [0.58, 0.59, 0.5, 0.5], [0.5, 0.5], 4, effect("dropout", 0.02, 0.01, kind="standard")),
        ArmRuns("uniform", [], [], 8, Effect("uniform", "same mean", None, None, False)),
    ]
    figure = plot_runs({"100 %": arms, "10 %": arms}, arm="guided", metric="accuracy")
    values, differences = figure.axes[:2]
    dots = [line for line in values.lines if line.get_marker() == "o" and len(line.get_xdata())]
    assert sorted(len(line.get_xdata()) for line in dots) == [2, 8]
    assert [len(line.get_xdata()) for line in values.lines if line.get_marker() == "x" and len(line.get_xdata())] == [2]
    assert {"4 lost", "8 lost", "accuracy of each run", "guided − arm, seed by seed"} <= set(texts(figure))
    assert [
        len(line.get_xdata()) for line in differences.lines if line.get_marker() == "o" and len(line.get_xdata())
    ] == [3]
    assert overlapping(figure) == []


def test_runs_without_a_guided_arm():
    figure = plot_runs({"100 %": [ArmRuns("dropout", [0.6, 0.7], [], 0, None)]}, arm=None, metric="accuracy")
    assert len(figure.axes) == 1


def test_drawings_are_the_same_for_the_same_numbers():
    draw = [figure_svg(plot_forest({"10 %": {"cola": [effect("dropout", 0.03, 0.01)]}}, arm="guided")) for _ in "ab"]
    assert draw[0] == draw[1]
