"""The benchmark of a training step's cost runs end to end, resumes, and its ratios are what they say."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from guided_dropout.models import load_lm
from guided_dropout.schedule import DropoutSchedule

ROOT = Path(__file__).parents[1]


@pytest.fixture
def overhead(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.overhead import __main__ as command
    from benchmarks.overhead import measure, summary

    return {"main": command.main, "measure": measure, "summary": summary}


@pytest.fixture
def schedule(tmp_path):
    made = DropoutSchedule.uniform(load_lm("demo"), 0.1)
    rates = dict.fromkeys(made.rates, 0.05) | {path: 0.1 * k for k, path in enumerate(list(made.rates)[:2])}
    return replace(made, rates=rates).save(tmp_path / "schedule.json")


def line(folder, rounds, *more):
    return [
        "demo",
        "--modes",
        "eager",
        "--rounds",
        str(rounds),
        "--batch-size",
        "2",
        "--length",
        "8",
        "--out",
        str(folder),
        *more,
    ]


def test_the_command_writes_results_and_a_summary_and_resumes(overhead, schedule, tmp_path):
    command = ("--schedule", str(schedule))
    overhead["main"](line(tmp_path, 2, *command))
    path = tmp_path / "demo-cpu" / "eager.json"
    first = json.loads(path.read_text())
    assert len(first["rounds"]) == 2
    assert all(seconds > 0 for r in first["rounds"] for seconds in r.values())
    low, high = first["setting"]["rates"]["guided"]
    assert (low, high) == (0.0, 0.1)
    assert first["setting"]["rates"]["guided-above-0"] == [0.001, 0.1]
    assert first["setting"]["rates"]["dropout"] == first["setting"]["rates"]["again"] == [0.1, 0.1]

    overhead["main"](line(tmp_path, 5, *command))
    second = json.loads(path.read_text())
    assert second["rounds"][:2] == first["rounds"]
    assert len(second["rounds"]) == 5
    assert [session["first_round"] for session in second["sessions"]] == [0, 2]
    page = (tmp_path / "README.md").read_text()
    assert "## demo, eager, cpu" in page
    assert "5 rounds in 2 sessions" in page
    assert "| `guided-above-0` | 0.001 to 0.1 |" in page

    overhead["main"](line(tmp_path, 5, *command))
    assert json.loads(path.read_text()) == second
    with pytest.raises(SystemExit, match="was measured with batch_size 2, this is 3; expected the same"):
        overhead["main"](line(tmp_path, 5, *command, "--batch-size", "3"))
    assert json.loads(path.read_text()) == second


def test_the_order_of_the_copies_favours_none(overhead):
    measure = overhead["measure"]
    assert measure.CYCLE == 24
    assert next(iter(measure.COPIES)) == overhead["summary"].YARDSTICK


def test_ratios_are_taken_round_by_round(overhead):
    generator = np.random.default_rng(0)
    speed = generator.uniform(1, 10, 50)  # of the machine, which all copies of a round meet
    rounds = [{"dropout": s, "again": s, "guided": 1.1 * s, "guided-above-0": 0.9 * s} for s in speed]
    found = overhead["summary"].ratios(rounds)
    for name, value in (("again", 1.0), ("guided", 1.1), ("guided-above-0", 0.9)):
        assert [found[name][key] for key in ("median", "q25", "q75")] == pytest.approx([value] * 3)
    noisy = [{**r, "guided": r["guided"] * f} for r, f in zip(rounds, generator.lognormal(0, 0.1, 50), strict=True)]
    values = [r["guided"] / r["dropout"] for r in noisy]
    found = overhead["summary"].ratios(noisy)["guided"]
    assert [found["q25"], found["median"], found["q75"]] == pytest.approx(np.percentile(values, [25, 50, 75]).tolist())
    low, high = found["interval_95"]
    assert found["q25"] < low < found["median"] < high < found["q75"]


def test_nothing_measured_is_said(overhead, tmp_path):
    overhead["main"](["--summary", "--out", str(tmp_path)])
    assert "Nothing has been measured yet" in (tmp_path / "README.md").read_text()
