"""What a person sees on the terminal: on a narrow one too, no number is cut off."""

import io
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from landscapes import bowl
from rich.console import Console

from guided_dropout.cli.console import depth_chart, diff_table, schedule_table, site_table
from guided_dropout.cli.landscape_tables import difference_table, landscape_table
from guided_dropout.schedule import DropoutSchedule
from guided_dropout.schedule.compare import diff

WIDTHS = st.integers(30, 100)
PATHS = [
    f"bert.encoder.layer.{i}.{place}.dropout" for i in range(3) for place in ("attention.self", "attention.output")
]
PLANNED = DropoutSchedule(
    rates={path: 0.0123 * (i + 1) for i, path in enumerate(PATHS)},
    scores={path: 1.1e-3 * (i + 1) for i, path in enumerate(PATHS)},
    kinds=dict.fromkeys(PATHS, "attention"),
    shape="linear",
    grouping="owner",
    upper=0.1,
    lower=0.0,
    model={"backbone_prefix": "bert.", "shapes": {}, "model_type": "bert"},
)
RATES = [f"{rate:.4f}" for rate in PLANNED.rates.values()]
SCORES = [f"{score:.1e}" for score in PLANNED.scores.values()]


def printed(table, width):
    file = io.StringIO()
    Console(file=file, width=width, soft_wrap=True, markup=False, emoji=False).print(table)
    return file.getvalue()


@given(WIDTHS)
def test_a_schedules_numbers_stand_in_full_and_its_bars_go_first(width):
    lines = printed(schedule_table(PLANNED, width), width)
    found = lines.split()
    assert [word for word in found if word in {*RATES, *SCORES}] == [
        number for pair in zip(SCORES, RATES, strict=True) for number in pair
    ]
    whole = all(path.removeprefix("bert.") in found for path in PATHS)
    assert whole or "█" not in lines
    assert all(len(line.rstrip()) <= max(width, 40) for line in lines.splitlines())


@given(WIDTHS)
def test_numbers_of_sites_and_differences_stand_in_full(width):
    rows = [
        {"path": path, "kind": "attention", "score": PLANNED.scores[path], "rate": 0.1, "calls": 2, "in_head": False,
         "scheduled_rate": rate, "parameters": ["a"]}
        for path, rate in PLANNED.rates.items()
    ]  # fmt: skip
    assert {*RATES, *SCORES, "0.1"} <= {*printed(site_table(rows), width).split()}
    found = printed(diff_table(diff(PLANNED, PLANNED.at_uniform(0.0456))), width).split()
    assert {*RATES, "0.0456", f"{0.0456 - PLANNED.rates[PATHS[0]]:+.4f}"} <= {*found}


@given(WIDTHS)
def test_a_chart_over_depth_has_all_layers(width):
    deep = replace(PLANNED, rates={f"bert.encoder.layer.{i}.output.dropout": 0.01 * (i % 8) for i in range(48)})
    assert "▁▂▃▄▅▆▇█" * 6 in printed(depth_chart(deep), width).split()


def test_a_landscapes_numbers_stand_in_full():
    landscape = bowl({"top:0.5": 2.0, "random:0.5": 1.0}, dims=1)
    for table in (landscape_table(landscape, level=0.5), difference_table(landscape, level=0.5)):
        for width in (40, 60, 80):
            assert sorted(printed(table, width).split()) == sorted(printed(table, 500).split())
