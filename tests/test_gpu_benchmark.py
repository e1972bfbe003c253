"""The GPU benchmark's script, at tiny sizes on a CPU: so that it works when there is a GPU at last."""

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton comes with PyTorch for CUDA, or with the gpu extra on Linux")

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu" / "run.py"


def run(folder, *options):
    command = [sys.executable, str(SCRIPT), "--out", str(folder), *options]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, env=env)


def test_writes_one_file_for_each_piece_and_goes_on_where_it_stopped(tmp_path):
    first = run(tmp_path, "--quick", "--only", "correctness")
    assert first.returncode == 0, first.stdout + first.stderr
    (file,) = tmp_path.glob("*/*.json")
    found = json.loads(file.read_text())
    assert file.stem == "correctness"
    assert found["result"]["ok"]
    assert {"date", "versions", "device", "triton"} <= found["machine"].keys()

    second = run(tmp_path, "--quick")
    assert second.returncode == 0, second.stdout + second.stderr
    assert "correctness: there already" in second.stdout
    results = {f.stem: json.loads(f.read_text())["result"] for f in tmp_path.glob("*/*.json")}
    assert results.keys() > {"correctness", "roofline", "bert-tiny-float32"}
    fisher = results["bert-tiny-float32"]
    assert {"plain, full logits", "plain, head at targets"} == fisher["fisher_over"].keys()
    assert fisher["fallback"] == []


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Run the script's `main` with other pieces; what it exits with."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    spec = importlib.util.spec_from_file_location("gpu_run", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def main(*options, **pieces):
        monkeypatch.setattr(module, "_pieces", lambda *_, **__: pieces)
        monkeypatch.setattr(sys, "argv", ["run.py", "--quick", "--out", str(tmp_path), *options])
        try:
            module.main()
        except SystemExit as e:
            return e.code

    main.module = module
    return main


def fails():
    raise RuntimeError("device-side assert")


def test_what_failed_is_told_and_run_again_and_keeps_nothing_else(script, tmp_path):
    right = {"ok": True}
    assert script(correctness=lambda: right, roofline=fails, bert=lambda: {"times": 1}) == "wrong: roofline"
    found = {f.stem: json.loads(f.read_text())["result"] for f in tmp_path.glob("*/*.json")}
    assert found == {
        "correctness": right,
        "roofline": {"ok": False, "failed": "RuntimeError: device-side assert"},
        "bert": {"times": 1},
    }
    again = {"correctness": fails, "bert": fails}  # both there already
    assert script("--minutes", "-1", roofline=fails, **again) == "wrong: roofline"
    assert script(roofline=fails, **again) == "wrong: roofline"
    assert script(roofline=lambda: {"rows": []}, **again) is None


def test_a_kernel_that_is_wrong_ends_it(script, tmp_path):
    assert script(correctness=lambda: {"ok": False}, roofline=lambda: {"rows": []}) == "wrong: correctness"
    assert [f.stem for f in tmp_path.glob("*/*.json")] == ["correctness"]


def test_tests_that_do_not_end_are_told(script, monkeypatch):
    monkeypatch.setattr(script.module, "TESTS_SECONDS", 0.01)
    found = script.module._library()
    assert (found["ok"], found["failed"]) == (False, "the tests had not ended after 0.01 s")


def test_without_a_gpu_it_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["run.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "no GPU found; expected one (or --quick" in capsys.readouterr().err
