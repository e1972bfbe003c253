"""The figure of all experiments holds each committed one, with the numbers of its runs."""

import json
import math
from pathlib import Path

import pytest
from scipy import stats

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "evidence"


@pytest.fixture
def summary(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.evidence import summary

    return summary


def from_runs(name, task, control):
    """Mean and t interval of guided − control, from the files of the runs."""
    values = {}
    for file in (RESULTS / name / "runs").glob("*.json"):
        run = json.loads(file.read_text(encoding="utf-8"))
        if run["key"]["task"] == task:
            values[run["key"]["arm"], run["key"]["seed"]] = run["result"]["value"]
    seeds = [seed for arm, seed in values if arm == "guided" and (control, seed) in values]
    differences = [values["guided", seed] - values[control, seed] for seed in seeds]
    low, high = stats.ttest_1samp(differences, 0).confidence_interval()
    return (math.fsum(differences) / len(seeds), low, high, len(seeds))


def test_it_holds_the_numbers_of_each_committed_experiment(summary):
    assert {folder.name for folder in RESULTS.iterdir()} <= set(summary.EXPERIMENTS)
    rows = {row.label: row for row in summary.read()}
    for name, label, task in (
        ("minilm-l6", "six-layer BERT: CoLA, 10 %", "cola"),
        ("demo", "embedded model: STS-B, 10 %", "stsb"),
        ("smollm2-135m", "SmolLM2-135M: SST-2, 0.5 %", "sst2"),
    ):
        for control in summary.CONTROLS:
            found = rows[label].effects[control]
            assert (found.mean, found.low, found.high, found.pairs) == pytest.approx(from_runs(name, task, control))
            assert found.decided == (found.low * found.high > 0)


def test_each_row_is_drawn_once_for_each_control(summary):
    rows = summary.read()
    axes = summary.draw(rows).axes
    assert len(axes) % len(summary.CONTROLS) == 0
    named = [label.get_text() for ax in axes[:: len(summary.CONTROLS)] for label in ax.get_yticklabels()]
    assert sorted(name.rpartition(" (")[0] for name in named) == sorted(row.label for row in rows)
    not_run = sum(text.get_text() == "not run" for ax in axes for text in ax.texts)
    assert not_run == sum(len(summary.CONTROLS) - len(row.effects) for row in rows)
