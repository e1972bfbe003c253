"""Under ``nn.DataParallel`` each replica computes with its own weights; here all replicas are on the CPU."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import classifier_of, language_model
from test_sites_families import state_of
from torch import Tensor, nn
from torch.nn.parallel import replicate

from guided_dropout import DropoutSchedule, add_residual_sites, apply_dropout, find_sites
from guided_dropout.errors import SiteError
from guided_dropout.regularizers import Context, GaussianDropout, Mixout

IDS = torch.arange(3, 19).reshape(2, 8)
SCALES = (1.0, 1.1, 0.8)

On = Callable[[nn.Module, contextlib.ExitStack], Any]


@pytest.fixture
def replicas(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module], list[nn.Module]]:
    """torch's replicas of a model; the weights of each are the model's times one of `SCALES`, to tell them apart."""

    def scaled(tensors: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
        return [[t if detach else t * SCALES[i] for t in tensors] for i in devices]  # buffers are detached

    module = sys.modules["torch.nn.parallel.replicate"]  # its name belongs to the function
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", scaled)
    monkeypatch.setattr(module, "_get_device_index", lambda device, optional: device)
    return lambda model: replicate(model, list(range(len(SCALES))))


def rates(model: nn.Module, stack: contextlib.ExitStack) -> None:
    stack.enter_context(apply_dropout(model, DropoutSchedule.uniform(model, 0.4)))


def residual(model: nn.Module, stack: contextlib.ExitStack) -> None:
    stack.enter_context(add_residual_sites(model, 0.4))


def noisy_residual(model: nn.Module, stack: contextlib.ExitStack) -> None:
    residual(model, stack)
    stack.enter_context(GaussianDropout().apply(model, Context()))


def noise(model: nn.Module, stack: contextlib.ExitStack) -> None:
    stack.enter_context(GaussianDropout().apply(model, Context()))


def mixed(model: nn.Module, stack: contextlib.ExitStack) -> None:
    stack.enter_context(Mixout(0.5).apply(model, Context()))


def logits(model: nn.Module) -> Tensor:
    torch.manual_seed(0)
    return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("family", "on"),
    [
        *(("bert", rates), ("llama", residual), ("llama", noisy_residual)),
        *(("bert", noise), ("gpt2", noise), ("bert", mixed), ("gpt2", mixed)),
    ],
)
def test_a_replica_does_what_the_model_would_with_the_replicas_weights(
    family: str, on: On, replicas: Callable[[nn.Module], list[nn.Module]]
) -> None:
    model = classifier_of(family).train()
    before = state_of(model)
    with contextlib.ExitStack() as stack:
        on(model, stack)
        found = [logits(replica) for replica in replicas(model)]
        found[1].square().sum().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        for scale, of_replica in zip(SCALES, found, strict=True):
            own = {n: p.detach().clone() for n, p in model.named_parameters()}
            for p in model.parameters():
                p.data *= scale
            expected = logits(model)
            torch.testing.assert_close(of_replica, expected)
            if scale == SCALES[1]:
                expected.square().sum().backward()
                torch.testing.assert_close(
                    gradients, {n: p.grad * scale for n, p in model.named_parameters() if p.grad is not None}
                )
                model.zero_grad()
            for n, p in model.named_parameters():
                p.data.copy_(own[n])
    assert state_of(model) == before
    plain = [logits(replica.eval()) for replica in replicas(model)]
    assert torch.equal(plain[0], logits(model.eval()))
    assert not torch.allclose(plain[1], plain[0])


def test_a_rate_for_each_call_is_refused(replicas: Callable[[nn.Module], list[nn.Module]]) -> None:
    model = language_model("albert").train()
    rates = {site.path: 0.05 * (i + 1) for i, site in enumerate(find_sites(model, per_call=True))}
    with apply_dropout(model, DropoutSchedule.from_rates(rates, model)):
        with pytest.raises(SiteError, match=r"nn\.DataParallel.*torchrun or accelerate"):
            logits(replicas(model)[1])
        logits(model)
