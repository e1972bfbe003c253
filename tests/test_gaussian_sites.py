"""Gaussian noise at the sites that were added to a model: on the residual stream and in adapters."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from families import classifier_of, language_model
from peft import LoraConfig, get_peft_model
from test_residual import WITHOUT
from test_sites_families import random_states, state_of
from torch import Tensor, nn

from guided_dropout import DropoutSchedule, add_residual_sites, apply_dropout, find_sites
from guided_dropout.errors import SiteError
from guided_dropout.regularizers import Context, GaussianDropout

# PEFT reads an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.arange(3, 19).reshape(2, 8)
RATE = 0.4


def with_lora(rate: float) -> nn.Module:
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=rate, init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return get_peft_model(language_model("llama"), config).eval()


def only_at(model: nn.Module, path: str) -> DropoutSchedule:
    """A schedule that drops at one site alone."""
    return DropoutSchedule.from_rates({site.path: RATE * (site.path == path) for site in find_sites(model)}, model)


def logits(model: nn.Module, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return model(input_ids=IDS).logits


def assert_noise_of_the_rate(before: list[Tensor], after: list[Tensor]) -> None:
    """Mean 1 and variance p / (1 - p) of the factors, and nothing dropped."""
    x, y = torch.cat([t.flatten() for t in before]).double(), torch.cat([t.flatten() for t in after]).double()
    ratio = (y / x)[x.abs() > 1e-6]
    variance, n = RATE / (1 - RATE), len(ratio)
    assert n > 10_000
    assert not (ratio == 0).any()
    assert abs(ratio.mean().item() - 1) < 6 * (variance / n) ** 0.5
    assert abs(ratio.var().item() - variance) < 6 * variance * (2 / n) ** 0.5


@pytest.mark.parametrize("place", [0, 3])
def test_a_residual_site_gets_gaussian_noise_of_its_rate(place: int) -> None:
    model = language_model("llama", attention_dropout=0.0).train()
    before: list[Tensor] = []
    after: list[Tensor] = []
    with add_residual_sites(model) as added, torch.no_grad():
        path = added.sites[place]
        written_by = model.get_submodule(path.rpartition(".")[0])
        written_by.register_forward_hook(lambda _, args, out: before.append(first(out)), prepend=True)
        written_by.register_forward_hook(lambda _, args, out: after.append(first(out)))
        with apply_dropout(model, only_at(model, path)), GaussianDropout().apply(model, Context()):
            before.clear(), after.clear()
            for seed in range(100):
                logits(model, seed)
    assert_noise_of_the_rate(before, after)


def first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("built", [0.0, 0.1])
def test_an_adapters_dropout_becomes_gaussian_noise_of_its_rate(built: float, late: bool) -> None:
    """Also where an identity stands before the schedule, and whichever of rates and noise comes first."""
    model = with_lora(built).train()
    path = next(site.path for site in find_sites(model) if site.in_adapter)
    layer = path.removesuffix(".lora_dropout.default")
    before: list[Tensor] = []
    after: list[Tensor] = []
    model.get_submodule(layer).register_forward_pre_hook(lambda _, args: before.append(args[0]))
    model.get_submodule(f"{layer}.lora_A.default").register_forward_pre_hook(lambda _, args: after.append(args[0]))
    schedule = only_at(model, path)
    with ExitStack() as stack, torch.no_grad():
        steps = [lambda: apply_dropout(model, schedule), lambda: GaussianDropout().apply(model, Context())]
        for put_on in reversed(steps) if late else steps:
            stack.enter_context(put_on())
        before.clear(), after.clear()
        for seed in range(100):
            logits(model, seed)
    assert_noise_of_the_rate(before, after)


@pytest.mark.parametrize("family", WITHOUT)
def test_evaluation_is_the_plain_model_and_removal_leaves_no_trace_of_noise_on_residual_sites(family: str) -> None:
    model = language_model(family)
    plain = logits(model)
    with add_residual_sites(model, RATE):
        before, states = state_of(model), random_states()
        noise = GaussianDropout().apply(model, Context())
        assert noise.facts["sites"] == 6
        assert random_states() == states
        assert torch.equal(logits(model), plain)
        model.train()
        assert not torch.equal(logits(model, 1), logits(model, 2))
        model.eval()
        noise.remove()
        assert state_of(model) == before
        dropped = logits(model.train())
        model.eval()
        again = GaussianDropout().apply(model, Context())
        again.remove()
        assert torch.equal(logits(model.train()), dropped)
        model.eval()
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("built", [0.0, 0.1])
def test_evaluation_is_the_plain_model_and_removal_leaves_no_trace_of_noise_on_adapters(built: float) -> None:
    model = with_lora(built)
    before, plain = state_of(model), logits(model)
    residual = add_residual_sites(model)
    dropout = apply_dropout(model, DropoutSchedule.uniform(model, RATE))
    noise = GaussianDropout().apply(model, Context())
    assert torch.equal(logits(model), plain)
    model.train()
    assert not torch.equal(logits(model, 1), logits(model, 2))
    model.eval()
    noise.remove(), dropout.remove(), residual.remove()
    assert state_of(model) == before


@pytest.mark.parametrize("reentrant", [True, False])
def test_noise_on_residual_sites_is_the_same_in_both_forwards_of_gradient_checkpointing(reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        model = language_model("llama", attention_dropout=0.0).double().train()
        if checkpointing:
            model.enable_input_require_grads()
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        with add_residual_sites(model, 0.3), GaussianDropout().apply(model, Context()):
            torch.manual_seed(0)
            model(input_ids=IDS, labels=IDS).loss.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for gradient, expected in zip(*found, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-14)


class StableDropout(nn.Module):
    """Draws a mask of its own, as SEW-D's does."""

    def __init__(self) -> None:
        super().__init__()
        self.drop_prob = 0.1

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand_like(x) > self.drop_prob) if self.training else x


@pytest.mark.parametrize("implementation", ["flash_attention_2", "kernels-community/flash-attn", "flex_attention"])
def test_attention_in_a_kernel_that_draws_its_own_masks_is_refused(implementation: str) -> None:
    model = language_model("llama", attention_dropout=0.1)
    model.config._attn_implementation = implementation
    before = state_of(model)
    with pytest.raises(
        SiteError, match=rf"attention_dropout has rate 0\.1 in the kernel of {implementation}.*\"sdpa\""
    ):
        GaussianDropout().apply(model, Context())
    assert state_of(model) == before
    rates = {site.path: 0.0 for site in find_sites(model)}
    with apply_dropout(model, DropoutSchedule.from_rates(rates, model)), GaussianDropout().apply(model, Context()):
        pass
    assert state_of(model) == before


class LockedDropout(nn.Dropout):
    """Derives from PyTorch's, and draws one mask for all positions."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        return x * x.new_empty(x.shape[0], 1, x.shape[2]).bernoulli_(1 - self.p) / (1 - self.p)


def test_a_dropout_that_draws_its_own_mask_is_refused() -> None:
    model = classifier_of("bert")
    for own in (StableDropout(), LockedDropout(0.1)):
        model.bert.embeddings.dropout = own
        with pytest.raises(
            SiteError, match=rf"bert\.embeddings\.dropout \({type(own).__name__}\) draws its own mask.*plain dropout"
        ):
            GaussianDropout().apply(model, Context())
        assert not any("forward" in vars(module) for module in model.modules())
