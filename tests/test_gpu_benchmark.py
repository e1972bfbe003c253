"""The GPU benchmark's script, at tiny sizes on a CPU: so that it works when there is a GPU at last."""

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


def test_without_a_gpu_it_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["run.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "no GPU found; expected one (or --quick" in capsys.readouterr().err
