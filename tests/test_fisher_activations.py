"""Activations that are written out step by step run in one, and only those."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import language_model
from fisher_oracles import draw_samples
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.activations import ACT2FN

from guided_dropout.detection import detect_objective
from guided_dropout.fisher.activations import in_one_step, written_out
from guided_dropout.fisher.check import checked_plan
from guided_dropout.fisher.fast import BatchedSquares

WRITTEN_OUT = ["gelu_new", "gelu_fast", "gelu_python", "gelu_python_tanh", "gelu_accurate"]
NOT = [
    "gelu",
    "gelu_pytorch_tanh",
    "silu",
    "relu",
    "quick_gelu",
    "gelu_10",
    "mish",
    "relu2",
    "laplace",
    "linear",
    "tanh",
]


class Names(TorchFunctionMode):
    """Notes what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_a_gelu_that_is_written_out_takes_one_operation_and_has_the_same_values(name: str) -> None:
    module = ACT2FN[name]
    x = torch.cat([torch.randn(64, dtype=torch.float64) * 4, torch.tensor([-torch.inf, torch.inf, torch.nan, 0.0])])
    plain = module(x)
    with in_one_step(written_out(module)), Names() as names:
        found = module(x)
    assert names.seen == ["gelu"]
    torch.testing.assert_close(found, plain, rtol=1e-9, atol=1e-9, equal_nan=True)
    assert "forward" not in vars(module)


@pytest.mark.parametrize("name", NOT)
def test_what_is_one_operation_already_or_no_gelu_stays(name: str) -> None:
    assert not written_out(ACT2FN[name])


class Odd(nn.Module):
    """GELU in several operations, but for one thing."""

    def __init__(self, but: str):
        super().__init__()
        self.but = but

    def forward(self, x: Tensor) -> Any:
        y = x * (1 + torch.erf(x / 2**0.5)) / 2
        if self.but == "far":
            return torch.where((x > 40) & (x < 100), 40.0, y)
        if self.but == "steep":
            return (y + y.detach()) / 2
        if self.but == "noisy":
            return y * (1 + 1e-6 * torch.randn_like(x))
        if self.but == "infinity":
            return torch.where(x == -torch.inf, 0.0, y)
        if self.but == "error":
            assert x.dim() == 3
        return (y,) if self.but == "tuple" else y


@pytest.mark.parametrize("but", ["far", "steep", "noisy", "infinity", "error", "tuple"])
def test_what_differs_anywhere_stays_and_random_states_too(but: str) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert not written_out(Odd(but))
    assert torch.equal(torch.get_rng_state(), before)
    assert written_out(Odd(""))


def test_in_half_precision_the_model_rounds_as_it_does() -> None:
    model = language_model("gpt2")
    assert len(written_out(model)) == 2
    assert not written_out(model.bfloat16())


def test_a_batch_runs_no_step_of_them() -> None:
    model = language_model("gpt2").requires_grad_(False).eval()
    samples = draw_samples([9, 5, 11])
    objective = detect_objective(model, samples[0])
    parameters = dict(model.named_parameters())
    plan = checked_plan(model, objective, parameters, samples)
    squares = BatchedSquares(model, objective, parameters, plan)
    with Names() as names:
        squares.add(samples)
    assert "gelu" in names.seen
    assert "tanh" not in names.seen
