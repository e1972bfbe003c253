"""The figures of landscapes show the numbers they were given."""

import sys

import numpy as np
import pytest
from landscapes import bowl
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from guided_dropout.errors import ArtefactError, DataError
from guided_dropout.plots.figures import figure_of, save_figure
from guided_dropout.plots.interactive import save_surfaces
from guided_dropout.plots.landscape import (
    colour_limits,
    figure_lines,
    figure_of_landscape,
    figure_planes,
    plot_contours,
    plot_curves,
    plot_shares,
    plot_surface,
)


def texts(ax):
    return " ".join(t.get_text() for t in figure_of(ax).findobj(Text))


SHARES = {f"{kind}:{share}": c for kind, c in (("top", 8.0), ("random", 4.0), ("bottom", 1.0)) for share in (0.5, 0.1)}


def test_curves_are_means_in_a_band_of_all_seeds():
    made = bowl({"all": 2.0, "top:0.5": 8.0}, dims=1)
    ax = plot_curves(made)
    values = np.stack([made.surface("top:0.5", seed) for seed in made.seeds])
    drawn = next(line for line in ax.lines if line.get_label() == "top 50 %")
    assert drawn.get_ydata() == pytest.approx(values.mean(0))
    assert drawn.get_xdata() == pytest.approx(made.grid.steps)
    band = ax.collections[1].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((values.min(), values.max()))
    assert "all parameters" in texts(ax)
    assert "loss (nats)" in texts(ax)


@pytest.mark.parametrize(
    "names",
    [
        ["all", "top:0.5", "top:0.5=", "random:0.5", "random:0.5="],
        ["all", "top:0.5", "top:0.1", "random:0.5", "random:0.1"],
        ["top:0.5", "top:0.5=", "top:0.1", "top:0.1="],
    ],
)
def test_each_curve_of_a_panel_looks_its_own(names):
    lines = plot_curves(bowl({name: 1.0 + i for i, name in enumerate(names)}, dims=1)).lines[: len(names)]
    assert len({(to_hex(line.get_color()), line.get_linestyle()) for line in lines}) == len(names)


def test_curves_of_a_mask_that_is_not_there_are_no_empty_panel():
    with pytest.raises(DataError, match=r"unknown mask 'top:0\.5'"):
        plot_curves(bowl({"all": 2.0}, dims=1), masks=["top:0.5"])


@pytest.mark.parametrize(("dims", "draw"), [(1, plot_curves), (2, plot_contours)], ids=["line", "plane"])
def test_a_landscape_draws_itself_on_the_axes_given_or_on_new_ones(dims, draw):
    made = bowl({"all": 2.0, "top:0.5": 8.0}, dims=dims)
    expected, ax = draw(made), Figure().add_subplot()
    for drawn in (made.plot(ax), made.plot()):
        assert texts(drawn) == texts(expected)
        assert len(drawn.collections) == len(expected.collections) > 0
        assert [list(line.get_ydata()) for line in drawn.lines] == [list(line.get_ydata()) for line in expected.lines]
    assert made.plot(ax) is ax
    assert made.plot() is not ax


def test_any_number_of_planes_is_drawn():
    figure = figure_planes(bowl({"all": 1.0, **{f"top:{i / 20:g}": float(i) for i in range(1, 12)}}, points=3, seeds=1))
    titles = [ax.get_title() for ax in figure.axes if ax.name == "3d"]
    assert (titles[0], titles[-1]) == ("a  all parameters", "l  top 55 %")


def test_planes_are_drawn_on_the_axes_given():
    made = bowl({"all": 2.0, "top:0.5": 8.0})
    first = plot_contours(made)
    assert plot_contours(made, first, mask="top:0.5") is first
    assert plot_contours(made) is not first
    assert "loss (nats)" in texts(first)
    ax = plot_surface(made, mask="top:0.5")
    low, high = colour_limits(made, ["top:0.5"])
    assert ax.get_zlim()[1] == pytest.approx(high, rel=0.1)
    assert low == pytest.approx(made.origin_loss)


def test_planes_side_by_side_share_one_scale():
    figure = figure_planes(bowl({"all": 2.0, "top:0.5": 8.0, "bottom:0.5": 1.0}))
    surfaces = [ax for ax in figure.axes if ax.name == "3d"]
    contours = [ax for ax in figure.axes if ax.get_xlabel() == "α" and ax.name != "3d"]
    assert (len(surfaces), len(contours)) == (3, 3)
    assert len({ax.get_zlim() for ax in surfaces}) == 1
    assert len({ax.collections[0].get_clim() for ax in contours}) == 1
    shown = texts(contours[0])
    assert all(title in shown for title in ("a  all parameters", "b  top 50 %", "c  bottom 50 %"))


def test_lines_of_shares_have_controls_of_the_same_size_beside_them():
    figure = figure_lines(bowl({"all": 2.0, **SHARES}, dims=1))
    assert [ax.get_title("left") for ax in figure.axes] == ["a  most informative", "b  random", "c  least informative"]
    for ax in figure.axes:
        assert [t.get_text() for t in ax.get_legend().get_texts()] == ["100 %", "50 %", "10 %"]
        assert ax.get_ylim() == figure.axes[0].get_ylim()
    with pytest.raises(DataError, match="no masks of a share with equal_norm=True"):
        figure_lines(bowl({"all": 2.0, **SHARES}, dims=1), equal_norm=True)


@pytest.mark.parametrize("names", [[*SHARES, *(f"{name}=" for name in SHARES)], ["top:0.5", "top:0.1=", "bottom:0.1="]])
def test_masks_of_both_lengths_are_all_drawn(names):
    figure = figure_of_landscape(bowl({"all": 2.0, **dict.fromkeys(names, 1.0)}, dims=1))
    kinds = {"most informative": "top", "random": "random", "least informative": "bottom"}
    found = [
        f"{kinds[ax.get_title('left')[3:]]}:{float(text.get_text().removesuffix(' %')) / 100:g}{end}"
        for part, end in zip(figure.subfigs, ("", "="), strict=True)
        for ax in part.axes
        for text in ax.get_legend().get_texts()[1:]
    ]
    assert sorted(found) == sorted(names)
    assert [part.get_suptitle() for part in figure.subfigs] == [
        "steps of their own length", "steps as long as the unmasked one",
    ]  # fmt: skip


def test_shares_are_drawn_with_their_intervals():
    made = bowl({"all": 2.0, **SHARES}, dims=1)
    ax = plot_shares(made)
    means = [made.rises(name)[0].mean() for name in ("top:0.1", "top:0.5")]
    drawn = {c.get_label(): c for c in ax.containers}
    assert drawn["top"].lines[0].get_ydata() == pytest.approx(means)
    assert {*drawn} == {"top", "random", "bottom"}
    assert drawn["top"].has_yerr
    assert "share of the parameters that move (%)" in texts(ax)


def test_what_is_not_finite_does_not_set_the_scale():
    made = bowl({"all": 2.0})
    made.losses[:, :, 0] = np.inf
    made.losses[:, :, 1] = np.nan
    assert np.isfinite(colour_limits(made, ["all"])).all()
    figure_of_landscape(made).draw_without_rendering()
    made.losses[:] = np.nan
    with pytest.raises(DataError, match="no finite loss; expected some"):
        figure_of_landscape(made)


@pytest.mark.parametrize("draw", [plot_contours, plot_surface, figure_planes])
def test_a_line_is_no_plane(draw):
    with pytest.raises(DataError, match="the landscape is a line; expected a plane: make it with --dims 2"):
        draw(bowl({"all": 2.0}, dims=1))
    with pytest.raises(DataError, match="the landscape is a plane; expected a line"):
        plot_curves(bowl({"all": 2.0}))


@pytest.mark.parametrize(("ending", "head"), [("png", b"\x89PNG"), ("svg", b"<svg"), ("pdf", b"%PDF")])
def test_figures_are_written_as_their_ending_says(ending, head, tmp_path):
    path = save_figure(figure_of(plot_contours(bowl({"all": 2.0}))), tmp_path / f"a.{ending}")
    assert path.read_bytes().startswith(head)
    with pytest.raises(ArtefactError, match=r"expected a name that ends in .png, .svg or .pdf"):
        save_figure(figure_of(plot_contours(bowl({"all": 2.0}))), tmp_path / "a.jpg")


def test_a_page_holds_all_it_needs(tmp_path):
    pytest.importorskip("plotly")
    path = save_surfaces(bowl({"all": 2.0, "top:0.5": 8.0}), tmp_path / "page.html")
    page = path.read_text(encoding="utf-8")
    assert "top 50 %" in page or "top 50 \\u0025" in page
    assert not [line for line in page.splitlines() if "<script" in line and "src=" in line.split(">")[0]]
    assert len(page) > 1_000_000


def test_without_plotly_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(ArtefactError, match=r"pip install 'guided-dropout\[plotly\]'"):
        save_surfaces(bowl({"all": 2.0}), tmp_path / "page.html")
    with pytest.raises(DataError, match="expected a plane"):
        save_surfaces(bowl({"all": 2.0}, dims=1), tmp_path / "page.html")
    with pytest.raises(ArtefactError, match=r"ends in \.html"):
        save_surfaces(bowl({"all": 2.0}), tmp_path / "page.htm")
