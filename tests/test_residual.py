"""Residual dropout sites on models that are built without."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from families import language_model, profile_of
from test_sites_families import random_states, state_of
from transformers import RwkvConfig, RwkvForCausalLM

from guided_dropout import DropoutSchedule, add_residual_sites, apply_dropout, find_sites
from guided_dropout.errors import GuidedDropoutError, ScheduleError, SiteError
from guided_dropout.regularizers import Context, GaussianDropout

WITHOUT = ["llama", "qwen3", "gemma", "gemma2", "mistral", "mixtral", "qwen2_moe"]
IDS = torch.arange(3, 19).reshape(2, 8)


def names_of(model: torch.nn.Module, prefix: str) -> tuple[str, ...]:
    return tuple(name for name, _ in model.named_parameters() if name.startswith(prefix))


def loss_of(model: torch.nn.Module, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return model(input_ids=IDS, labels=IDS).loss


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    model.zero_grad()
    loss_of(model).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("family", WITHOUT)
def test_each_block_gets_two_sites_fed_by_its_attention_and_its_feed_forward_network(family: str) -> None:
    model = language_model(family)
    assert len(find_sites(model)) == 2
    handle = add_residual_sites(model, 0.1)
    sites = {site.path: site for site in find_sites(model)}
    added = [sites[path] for path in handle.sites]
    assert len(added) == 4
    assert len(sites) == 6
    assert [(site.rate, site.calls, site.kind, site.in_head) for site in added] == [(0.1, 1, "attribute", False)] * 4
    for layer in (0, 1):
        here = f"model.layers.{layer}."
        norms = ("post_attention_layernorm.", "post_feedforward_layernorm.") if family == "gemma2" else ("", "")
        for site, part, norm in zip(added[2 * layer :], ("self_attn.", "mlp."), norms, strict=False):
            after = names_of(model, here + norm) if norm else ()
            assert site.parameters == names_of(model, here + part) + after


def test_a_norm_on_the_stream_hides_no_write_that_comes_after_it() -> None:
    """RWKV's first block normalises what comes in, before the first of its writes."""
    config = RwkvConfig(vocab_size=32, hidden_size=16, attention_hidden_size=16, num_hidden_layers=2, context_length=16)
    model = RwkvForCausalLM(config)
    sites = add_residual_sites(model, 0.1).sites
    assert [path.removesuffix(".residual_dropout") for path in sites] == [
        f"rwkv.blocks.{k}.{part}" for k in (0, 1) for part in ("attention.output", "feed_forward")
    ]


class PostNorm(torch.nn.Module):
    """A block with its norms after the additions, and nothing else inside."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.feed = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.first, self.second = torch.nn.LayerNorm(8), torch.nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x + self.mix(x))
        return self.second(torch.mul(input=x, other=1.0) + self.feed(x))


def test_blocks_with_norms_after_their_additions_have_all_their_writes() -> None:
    model = torch.nn.Sequential(PostNorm(), PostNorm())
    handle = add_residual_sites(model, 0.1, inputs={"input": torch.randn(2, 3, 8)})
    assert [path.removesuffix(".residual_dropout") for path in handle.sites] == ["0.mix", "0.feed", "1.mix", "1.feed"]


class InPlace(torch.nn.Module):
    """Llama 4's experts add to what the shared one made, in its place; so does a block with parts side by side."""

    def __init__(self, around: bool) -> None:
        super().__init__()
        self.shared, self.routed, self.around = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), around

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.shared(x)
        made.add_(self.routed(x))
        return x + made if self.around else made


class Around(torch.nn.Module):
    """A block that adds what its only part makes."""

    def __init__(self, part: torch.nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.part(x)


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ([Around(InPlace(False)), Around(InPlace(False))], ["0.part", "1.part"]),
        ([InPlace(True), InPlace(True)], ["0.shared", "0.routed", "1.shared", "1.routed"]),
    ],
    ids=["within a part", "in the block"],
)
def test_what_is_added_in_place_is_written_too(blocks: list[torch.nn.Module], expected: list[str]) -> None:
    model = torch.nn.Sequential(*blocks)
    inputs = {"input": torch.randn(2, 3, 8)}
    handle = add_residual_sites(model, 1 - 1e-9, inputs=inputs)
    assert [path.removesuffix(".residual_dropout") for path in handle.sites] == expected
    assert torch.equal(model.train()(**inputs), inputs["input"])


def by_hand(model: torch.nn.Module, rates: list[float]) -> torch.Tensor:
    """Llama's forward written out, with dropout on both writes of each block."""
    base = model.model
    hidden = base.embed_tokens(IDS)
    position = base.rotary_emb(hidden, torch.arange(8)[None])
    for i, layer in enumerate(base.layers):
        written = layer.self_attn(layer.input_layernorm(hidden), position_embeddings=position, attention_mask=None)[0]
        hidden = hidden + F.dropout(written, rates[2 * i])
        hidden = hidden + F.dropout(layer.mlp(layer.post_attention_layernorm(hidden)), rates[2 * i + 1])
    return model.lm_head(base.norm(hidden))


def test_it_is_dropout_on_what_is_added_to_the_stream() -> None:
    model = language_model("llama", attention_dropout=0.0).double().train()
    rates = [0.1, 0.2, 0.3, 0.4]
    torch.manual_seed(0)
    expected = by_hand(model, rates)
    with add_residual_sites(model) as handle:
        schedule = dict(zip(handle.sites, rates, strict=True))
        schedule |= {site.path: 0.0 for site in find_sites(model) if site.kind == "attention"}
        with apply_dropout(model, DropoutSchedule.from_rates(schedule, model)):
            torch.manual_seed(0)
            assert torch.allclose(model(input_ids=IDS).logits, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("family", WITHOUT)
def test_evaluation_is_the_plain_model_and_removal_leaves_no_trace(family: str) -> None:
    model = language_model(family)
    before, states = state_of(model), random_states()
    names, saved = [n for n, _ in model.named_parameters()], list(model.state_dict())
    modules = [n for n, _ in model.named_modules()]
    plain = model(input_ids=IDS).logits
    handle = add_residual_sites(model, 0.5)
    assert random_states() == states
    assert torch.equal(model(input_ids=IDS).logits, plain)
    assert [n for n, _ in model.named_parameters()] == names
    assert list(model.state_dict()) == saved
    assert [n for n, _ in model.named_modules()] == modules
    assert not torch.equal(model.train()(input_ids=IDS).logits, plain)
    model.eval()
    handle.remove()
    handle.remove()
    assert state_of(model) == before


def test_a_rate_of_zero_changes_nothing_in_training() -> None:
    model = language_model("llama", attention_dropout=0.0).train()
    plain = loss_of(model)
    with add_residual_sites(model):
        assert torch.equal(loss_of(model), plain)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_gradient_checkpointing_drops_the_same_in_both_forwards(family: str, reentrant: bool) -> None:
    model = language_model(family, attention_dropout=0.0).double().train()
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # which takes float64
    add_residual_sites(model, 0.3)
    expected = gradients(model)
    model.enable_input_require_grads()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    for found, wanted in zip(gradients(model), expected, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-10, atol=1e-14)


def test_schedules_give_the_sites_rates_by_their_fisher_scores() -> None:
    model = language_model("llama")
    with add_residual_sites(model) as handle:
        profile = profile_of(model)
        schedule = DropoutSchedule.from_profile(profile, model, upper=0.4, lower=0.05)
        means = profile.tensor_means
        for path in handle.sites:
            part = path.split(".")[3]
            names = names_of(model, f"{path.split(part)[0]}{part}.")
            assert schedule.scores[path] == pytest.approx(sum(means[n] for n in names) / len(names))
        with apply_dropout(model, schedule):
            assert {site.path: site.rate for site in find_sites(model)} == schedule.rates
        assert [site.rate for site in find_sites(model) if site.path in handle.sites] == [0.0] * 4
    with pytest.raises(ScheduleError, match="residual_dropout is no dropout site of LlamaForCausalLM"):
        apply_dropout(model, schedule)


def test_removed_under_a_schedule_they_do_not_come_back() -> None:
    model = language_model("llama")
    before = state_of(model)
    residual = add_residual_sites(model)
    dropout = apply_dropout(model, DropoutSchedule.uniform(model, 0.2))
    residual.remove()
    dropout.remove()
    assert state_of(model) == before


def test_a_copy_of_the_model_has_sites_of_its_own() -> None:
    model = language_model("llama")
    handle = add_residual_sites(model, 0.2)
    twin = copy.deepcopy(model)
    handle.remove()
    sites = [site for site in find_sites(twin) if site.kind == "attribute"]
    assert [(site.path, site.rate) for site in sites] == [(path, 0.2) for path in handle.sites]
    assert sites[0].parameters == names_of(twin, "model.layers.0.self_attn.")


@pytest.mark.parametrize("family", ["bert", "gpt2", "gpt_neox", "t5", "bart", "falcon", "phi3"])
def test_a_model_that_has_residual_dropout_is_refused(family: str) -> None:
    model = language_model(family)
    with pytest.raises(SiteError, match=r"found no block of .* without dropout; expected one that adds to it"):
        add_residual_sites(model)


def test_twice_is_refused_and_so_is_a_rate_that_is_none() -> None:
    model = language_model("llama")
    with pytest.raises(ScheduleError, match=r"1\.5"):
        add_residual_sites(model, 1.5)
    with add_residual_sites(model), pytest.raises(SiteError, match="has added residual sites already"):
        add_residual_sites(model)
    add_residual_sites(model).remove()


def test_a_removed_handle_is_not_used_again() -> None:
    handle = add_residual_sites(language_model("llama"))
    handle.remove()
    with (
        pytest.raises(GuidedDropoutError, match=r"ResidualSitesHandle .*call add_residual_sites again"),
        handle,
    ):
        pass


@pytest.mark.parametrize("first", [0, 1])
def test_sites_and_noise_come_off_in_any_order(first: int) -> None:
    model = language_model("llama").train()
    before = [sorted(vars(module)) for module in model.modules()]
    handles = [add_residual_sites(model, 0.2), GaussianDropout().apply(model, Context())]
    handles[first].remove()
    handles[1 - first].remove()
    assert [sorted(vars(module)) for module in model.modules()] == before
