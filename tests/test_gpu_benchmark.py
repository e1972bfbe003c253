"""The GPU benchmark's script, at tiny sizes on a CPU: so that it works when there is a GPU at last."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton comes with PyTorch for CUDA, or with the gpu extra on Linux")

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu" / "run.py"


def run(folder, *options):
    command = [sys.executable, str(SCRIPT), "--out", str(folder), *options]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, env=env)


def test_writes_one_file_for_each_piece_and_goes_on_where_it_stopped(tmp_path):
    first = run(tmp_path, "--quick", "--only", "correctness", "bert-tiny-float32")
    assert first.returncode == 0, first.stdout + first.stderr
    found = {f.stem: json.loads(f.read_text()) for f in tmp_path.glob("*/*.json")}
    assert sorted(found) == ["bert-tiny-float32", "correctness"]
    assert found["correctness"]["result"]["ok"]
    assert {"date", "versions", "device", "triton"} <= found["correctness"]["machine"].keys()
    fisher = found["bert-tiny-float32"]["result"]
    assert {"plain, full logits", "plain, head at targets"} == fisher["fisher_over"].keys()
    assert fisher["fallback"] == []

    (damaged,) = tmp_path.glob("*/correctness.json")
    damaged.unlink()
    second = run(tmp_path, "--quick")
    assert second.returncode == 0, second.stdout + second.stderr
    assert "bert-tiny-float32: there already" in second.stdout
    assert {f.stem for f in tmp_path.glob("*/*.json")} > {"correctness", "roofline", "bert-tiny-float32"}


def test_without_a_gpu_it_says_what_to_do(tmp_path):
    refused = run(tmp_path)
    assert refused.returncode == 2
    assert "no GPU found; expected one (or --quick" in refused.stderr
