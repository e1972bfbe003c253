"""The landscape benchmark runs, and its figures come from the numbers."""

import json

import pytest
from tiny import WORDS, save_tiny_bert

from benchmarks.landscape import __main__ as benchmark
from benchmarks.landscape import figures


@pytest.fixture
def given(tmp_path):
    save_tiny_bert(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join(" ".join(WORDS[(i + j) % 17] for j in range(12)) for i in range(40)))
    return ["--model", str(tmp_path / "model"), "--text", str(tmp_path / "text.txt"), "--max-length", "12"]


def test_each_method_is_timed_beside_the_plain_forward(given, tmp_path):
    methods = ["again", "plane", "row", "whole-head", "writing", "reloaded", "loss-landscapes", "landscaper"]
    benchmark.main([*given, "--samples", "8", "--rounds", "2", "--out", str(tmp_path / "out"), "--methods", *methods])
    found = json.loads((tmp_path / "out" / "landscape.json").read_text())
    timed, failed = found["methods"], found["failed"]
    assert {*timed} | {*failed} == {"forward", *methods}
    assert {*failed} <= {"loss-landscapes", "landscaper"}  # where they are not installed
    assert timed["forward"]["ratio_to_forward"]["median"] == 1
    assert all(len(row["seconds_per_point"]["all"]) == 2 for row in timed.values())
    text = (tmp_path / "out" / "README.md").read_text()
    assert all(f"| {name}" in text for name in ("plane", "reloaded", "landscaper"))


def test_figures_of_a_model(given, tmp_path):
    sizes = {"samples": 8, "fisher-samples": 8, "plane-points": 3, "line-points": 5, "seeds": 3}
    options = ["--name=tiny", "--shares", "0.5", "0.1", *(f"--{name}={size}" for name, size in sizes.items())]
    folders = [f"--{name}={tmp_path / name}" for name in ("work", "results", "figures")]
    for _ in range(2):  # the second time from what the first has left
        figures.main([*given, *options, *folders])
    numbers = json.loads((tmp_path / "results" / "landscape-tiny" / "lines-numbers.json").read_text())
    assert len(numbers["masks"]) == 13
    assert len(list((tmp_path / "figures").glob("landscape-tiny-*.png"))) == 5
    assert "`top:0.1=`" in (tmp_path / "results" / "landscape-tiny" / "README.md").read_text()
