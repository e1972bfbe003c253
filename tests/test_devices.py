"""Devices that do not compute in float64, as Apple's do not, are refused before any work."""

import sys

import pytest
import torch
from families import language_model
from torch.overrides import TorchFunctionMode

from guided_dropout import devices, estimate_fisher
from guided_dropout.cli import app as cli
from guided_dropout.devices import has_float64, to_device
from guided_dropout.errors import ModelError


class WithoutFloat64(TorchFunctionMode):
    """Within, this machine refuses float64 as an Apple GPU does."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.zeros and (kwargs or {}).get("dtype") == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return func(*args, **(kwargs or {}))


def test_float64_is_found_by_trying():
    assert has_float64("cpu")
    assert has_float64("nowhere")
    with WithoutFloat64():
        assert not has_float64("cpu")


def test_a_model_on_such_a_device_is_refused():
    model = language_model("bert")
    samples = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}]
    with WithoutFloat64(), pytest.raises(ModelError, match=r"is on cpu, which does not compute in float64; .* the CPU"):
        estimate_fisher(model, samples)


def test_the_command_refuses_such_a_device_before_it_loads_anything(tmp_path, monkeypatch, capsys):
    line = f"fisher no/model --text nowhere.txt --device cpu --out {tmp_path / 'new'}"
    monkeypatch.setattr(sys, "argv", ["guided-dropout", *line.split()])
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    with WithoutFloat64(), pytest.raises(SystemExit, match="2"):
        cli.main()
    assert capsys.readouterr().err == (
        "error: --device cpu does not compute in float64; expected a device that does, for the Fisher's sums: use "
        "--device cpu\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("capable", [True, False])
def test_by_default_such_an_accelerator_is_left_alone(capable, monkeypatch):
    """`meta` stands in for an accelerator."""
    model = language_model("bert")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    monkeypatch.setattr(devices, "has_float64", lambda device: capable)
    model = to_device(model)
    assert {p.device.type for p in model.parameters()} == {"meta" if capable else "cpu"}
