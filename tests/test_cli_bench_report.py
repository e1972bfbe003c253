"""`guided-dropout bench report` as a stranger meets it."""

import csv
from collections import defaultdict

import pytest
from samples_of_experiments import write_experiment
from test_cli import run

from guided_dropout.bench.folder import Experiment


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")
    return lambda *args: run(tmp_path, *args, monkeypatch=monkeypatch, capsys=capsys)


def test_it_says_what_was_found_and_where_it_is(command, tmp_path):
    write_experiment(tmp_path / "e", tasks=["cola"], fractions=[1.0], seeds=4, missing=lambda k: k.seed == 3)
    code, out, err = command("bench", "report", "e", "--margin", 0.05)
    assert code == 0, err
    assert "12 of 16 runs" in out
    assert "100 % of the training data. Against standard dropout. cola: guided − dropout = " in out
    assert "e/report/report.html" in out
    assert "±0.05" in (tmp_path / "e" / "report" / "report.md").read_text()
    code, out, err = command("bench", "report", "e", "--out", "elsewhere")
    assert code == 0, err
    assert (tmp_path / "elsewhere" / "comparisons.csv").exists()
    assert "guided-dropout bench report e --out elsewhere\n" in (tmp_path / "elsewhere" / "report.md").read_text()


def test_any_two_arms_can_be_compared(command, tmp_path):
    write_experiment(tmp_path / "e", tasks=["cola", "rte"], fractions=[1.0, 0.1], seeds=4)
    code, out, err = command("bench", "compare", "e", "uniform", "dropout", "--csv", "pair.csv")
    assert code == 0, err
    rows = list(csv.DictReader((tmp_path / "pair.csv").read_text().splitlines()))
    assert [(r["fraction"], r["task"]) for r in rows] == [
        (f, t) for f in ("1.0", "0.1") for t in ("cola", "rte", "mean over tasks")
    ]
    values = defaultdict(dict)
    for run_ in Experiment(tmp_path / "e").runs():
        if (run_.key.task, run_.key.fraction) == ("rte", 0.1):
            values[run_.key.arm][run_.key.seed] = run_.result.value
    expected = [values["uniform"][s] - values["dropout"][s] for s in range(4)]
    assert float(rows[4]["mean"]) == pytest.approx(sum(expected) / 4)
    assert int(rows[4]["pairs"]) == 4
    assert f"10 % of the training data, rte: uniform − dropout = {sum(expected) / 4:+.4f}" in out


def test_a_comparison_is_not_written_over_another_table(command, tmp_path):
    write_experiment(tmp_path / "e", tasks=["cola"], fractions=[1.0], seeds=3)
    line = ("bench", "compare", "e", "uniform", "dropout", "--csv", "train.csv")
    for begins in ("text,label", "m", "x" * 999):
        (tmp_path / "train.csv").write_text(f"{begins}\nA sentence.,1\n")
        code, _, err = command(*line)
        assert code == 2
        assert f"train.csv is there already and begins with {begins[:60]!r}" in err
        assert (tmp_path / "train.csv").read_text() == f"{begins}\nA sentence.,1\n"
    (tmp_path / "train.csv").write_text("")
    assert command(*line)[0] == 0
    assert command(*line)[0] == 0  # over its own


@pytest.mark.parametrize("left", ["", '{"kind": "bench-grid", "schema": 1, "grids": [{"models": ["demo"]}]}'])
def test_of_a_damaged_grid_it_says_what_to_do(command, tmp_path, left):
    write_experiment(tmp_path / "e", tasks=["cola"], fractions=[1.0], seeds=2)
    (tmp_path / "e" / "grid.json").write_text(left)
    code, _, err = command("bench", "report", "e")
    assert (code, err.count("\n")) == (2, 1)
    assert "delete the file, and ask `guided-dropout bench run` again for all that was asked for" in err


def test_arms_are_compared_as_they_were_asked_for(command, tmp_path):
    write_experiment(tmp_path / "e", tasks=["cola"], fractions=[1.0], arms=["mixout", "l2-sp:alpha=0.5"], seeds=3)
    code, out, err = command("bench", "compare", "e", "mixout:p=0.7", "l2-sp:alpha=0.50")
    assert code == 0, err
    assert "mixout − l2-sp:alpha=0.5 = " in out


def test_of_a_damaged_run_it_says_what_to_do(command, tmp_path):
    experiment = write_experiment(tmp_path / "e", tasks=["cola"], fractions=[1.0], seeds=2)
    file = experiment.file(experiment.runs()[0].key)
    file.write_text("")
    code, _, err = command("bench", "report", "e")
    assert (code, err.count("\n")) == (2, 1)
    assert file.name in err
    assert "(run `guided-dropout bench run` again, or delete the file)" in err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("bench report nowhere", "cannot read nowhere/experiment.json"),
        ("bench report e --margin 0", "found a margin of 0.0; expected a difference above 0"),
        ("bench report e --out mine", "holds other files and no report.html"),
        ("bench compare e guided mixout", "found no runs of 'mixout'; expected one of these arms: dropout, guided"),
        ("bench compare e guided guided", "'guided' with itself; expected two arms"),
        ("bench report empty", "found no runs; expected at least one: run `guided-dropout bench run` first"),
    ],
)
def test_mistakes_are_one_line(command, tmp_path, line, words):
    write_experiment(tmp_path / "e", tasks=["cola"], fractions=[1.0], seeds=1)
    write_experiment(tmp_path / "empty", missing=lambda k: True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    code, _, err = command(*line.split())
    assert code == 2
    assert words in err
    assert err.count("\n") == 1
