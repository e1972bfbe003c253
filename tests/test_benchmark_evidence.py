"""The figure of all experiments holds each committed one, with the numbers of its runs."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
from scipy import stats

from guided_dropout.errors import DataError

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "evidence"


@pytest.fixture
def summary(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.evidence import summary

    return summary


def from_runs(name, task, control, fraction=None):
    """Mean and t interval of guided − control, from the files of the runs, which have one fraction or this one."""
    values = {}
    for file in (RESULTS / name / "runs").glob("*.json"):
        run = json.loads(file.read_text(encoding="utf-8"))
        if run["key"]["task"] == task and fraction in (None, run["key"]["fraction"]):
            key = run["key"]["arm"], run["key"]["seed"]
            assert key not in values
            values[key] = run["result"]["value"]
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
        assert {*rows[label].effects} == {*summary.CONTROLS} - {"top-only"}
        for control, found in rows[label].effects.items():
            assert (found.mean, found.low, found.high, found.pairs) == pytest.approx(from_runs(name, task, control))
            assert found.decided == (found.low * found.high > 0)
    for label, task in (("CoLA", "cola"), ("MRPC", "mrpc")):
        whole = rows[f"embedded model: {label}, 100 %"].effects
        assert {*whole} == {*summary.CONTROLS}
        for control, found in whole.items():
            expected = from_runs("demo-controls", task, control, 1.0)
            assert (found.mean, found.low, found.high, found.pairs) == pytest.approx(expected)
    # Plain dropout has the mean rate of this one, and is its uniform control.
    same_mean = rows["embedded model, rates up to 0.2: SST-2, 10 %"].effects
    for control, arm in (("uniform", "dropout"), ("top-only", "top-only")):
        found = same_mean[control]
        expected = from_runs("demo-sst2-mean10", "sst2", arm)
        assert (found.mean, found.low, found.high, found.pairs) == pytest.approx(expected)
    assert "dropout" not in same_mean


def test_each_row_is_drawn_once_for_each_control(summary):
    rows = summary.read()
    axes = summary.draw(rows).axes
    assert len(axes) % len(summary.CONTROLS) == 0
    named = [label.get_text() for ax in axes[:: len(summary.CONTROLS)] for label in ax.get_yticklabels()]
    assert sorted(name.rpartition(" (")[0] for name in named) == sorted(row.label for row in rows)
    not_run = sum(text.get_text() == "not run" for ax in axes for text in ax.texts)
    assert not_run == sum(len(summary.CONTROLS) - len(row.effects) for row in rows)


def test_arms_of_two_experiments_are_compared_by_seed(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.evidence.across import across

    folder = RESULTS / "demo-controls"
    found = across(str(folder), "guided", str(folder), "uniform")
    for task, fraction in (("cola", 0.25), ("cola", 1.0), ("rte", 0.25), ("mrpc", 0.25), ("stsb", 0.25)):
        pair = found[task, fraction]
        expected = from_runs("demo-controls", task, "uniform", fraction)
        assert (pair.mean, *pair.t_interval, pair.n) == pytest.approx(expected)
    name = "demo_cola_0.25_uniform_003.json"
    run = json.loads((folder / "runs" / name).read_text(encoding="utf-8"))
    run["result"]["pairing"]["batches"] = "others"
    (tmp_path / "runs").mkdir()
    shutil.copy(folder / "experiment.json", tmp_path)
    (tmp_path / "runs" / name).write_text(json.dumps(run), encoding="utf-8")
    with pytest.raises(DataError, match=r"cola, seed 3: found .* expected one pairing"):
        across(str(folder), "guided", str(tmp_path), "uniform")
    with pytest.raises(DataError, match="share no seed"):
        across(str(folder), "guided", str(tmp_path), "none")


def test_rates_that_were_tried_in_another_setting_are_not_taken_over(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.evidence import tune

    made = json.loads((RESULTS / "demo" / "tuning.json").read_text(encoding="utf-8"))
    assert made["setting"]["fraction"] == 0.1
    shutil.copy(RESULTS / "demo" / "tuning.json", tmp_path)
    line = (
        f"tune.py demo --data nowhere --epochs {made['setting']['epochs']} --fraction 0.5 --out {tmp_path}/tuning.json"
    )
    monkeypatch.setattr(sys, "argv", line.split())
    with pytest.raises(SystemExit, match=r"'fraction': 0.1.* not .*'fraction': 0.5"):
        tune.main()
    assert json.loads((tmp_path / "tuning.json").read_text(encoding="utf-8")) == made
