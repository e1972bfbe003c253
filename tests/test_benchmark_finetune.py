"""The benchmark of fine-tuning runs, told that there is a card: what it would start, without starting it."""

import json
from subprocess import CompletedProcess

import pytest
import torch
from samples_of_results import run as a_run

from benchmarks.finetune import run as script


@pytest.mark.parametrize(("visible", "card"), [(None, "0"), ("3,1", "3")])
def test_both_ways_get_one_precision_and_one_card(visible, card, tmp_path, monkeypatch):
    for name, value in {"is_available": True, "get_device_name": "NVIDIA H200", "is_bf16_supported": True}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    seen = []

    def started(command, *, env, **_):
        seen.append((command, env["CUDA_VISIBLE_DEVICES"]))
        out = command[command.index("--out") + 1]
        if "finetune" in command:
            a_run("dropout", 0, 0.5, provenance={"device": "cuda:0"}).save(out)
        else:
            with open(out, "w") as file:
                json.dump({"accuracy": 0.5, "device": "cuda:0", "devices": 1}, file)
        return CompletedProcess(command, 0, "", "")

    texts = [(f"text {i}",) for i in range(40)]
    monkeypatch.setattr(script, "load_task", lambda *_: script.Examples(texts, [0, 1] * 20))
    monkeypatch.setattr(script.subprocess, "run", started)
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["run", "MODEL", "--data", "GLUE", "--tasks", "rte", "--seeds", "2", "--no-grid"])
    script.main()
    assert [(command[command.index("--precision") + 1], one) for command, one in seen] == [("bfloat16", card)] * 4
    (folder,) = (tmp_path / "gpu").iterdir()
    assert folder.name == "nvidia-h200"
    found = json.loads((folder / "finetune" / "runs.json").read_text())
    assert found["provenance"]["device"] == "NVIDIA H200"
    assert {p["device"] for p in found["pairs"]} == {"cuda:0"}
    assert "NVIDIA H200 in bfloat16" in (folder / "finetune" / "README.md").read_text()
