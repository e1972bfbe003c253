"""Models in which a forward on a tiny batch is not the whole story: experts, modules exchanged, shared dropout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from families import language_model, profile_of
from torch import nn

from guided_dropout import DropoutSchedule, apply_dropout
from guided_dropout.errors import ScheduleError, SiteError
from guided_dropout.identity import weights_digest
from guided_dropout.schedule import controls
from guided_dropout.sites import find_sites, trace


def switch(seed: int) -> transformers.PreTrainedModel:
    torch.manual_seed(seed)
    config = transformers.SwitchTransformersConfig(
        vocab_size=60, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, num_experts=12, dropout_rate=0.1,
        num_sparse_encoder_layers=1, num_decoder_layers=2, num_sparse_decoder_layers=1, router_jitter_noise=0.0,
    )  # fmt: skip
    return transformers.SwitchTransformersForConditionalGeneration(config)


def expert_rates(model: nn.Module) -> set[float]:
    return {m.p for n, m in model.named_modules() if isinstance(m, nn.Dropout) and ".experts." in n}


def test_experts_that_no_token_reaches_have_sites_and_get_their_rates() -> None:
    model = switch(0)
    found = trace(model)
    experts = {site.path: site for site in found.sites if ".experts." in site.path}
    assert len(experts) == 24 > sum(".experts." in path for path in found.calls)  # of 12 in two layers
    for path, site in experts.items():
        assert len(site.parameters) == 2
        assert all(name.startswith(path.removesuffix("dropout")) for name in site.parameters)
        assert (site.calls, site.kind, site.rate) == (1, "module", 0.1)
    ids = torch.randint(5, 60, (4, 32))
    with apply_dropout(model, DropoutSchedule.uniform(model, 0.0)):
        assert expert_rates(model) == {0.0}
        model.train()
        assert torch.equal(*(model(input_ids=ids, decoder_input_ids=ids).logits for _ in range(2)))
    assert expert_rates(model) == {0.1}


def test_weights_that_a_router_casts_are_their_own_type_again() -> None:
    model = switch(0).bfloat16()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    find_sites(model)
    apply_dropout(model, DropoutSchedule.uniform(model, 0.2)).remove()
    after = model.state_dict()
    assert {name: p.dtype for name, p in after.items()} == {name: p.dtype for name, p in before.items()}
    assert all(torch.equal(after[name], p) for name, p in before.items())


def test_sites_do_not_depend_on_where_tokens_are_routed() -> None:
    models = [switch(seed) for seed in range(3)]
    assert len({frozenset(path for path in trace(model).calls if ".experts." in path) for model in models}) > 1
    assert len({frozenset(site.path for site in find_sites(model)) for model in models}) == 1
    with apply_dropout(models[1], DropoutSchedule.uniform(models[0], 0.2)):
        assert expert_rates(models[1]) == {0.2}


@pytest.mark.parametrize("use_cache", [True, False])  # with one, a layer beyond its length does not run
def test_layers_that_the_configuration_cuts_off_have_no_sites(use_cache: bool) -> None:
    model = language_model("llama", num_hidden_layers=3, use_cache=use_cache)
    model.config.num_hidden_layers = 2  # the forward goes through so many of them
    assert [site.path for site in find_sites(model)] == [
        f"model.layers.{k}.self_attn.attention_dropout" for k in range(2)
    ]


def test_modules_that_a_forward_exchanges_are_named_and_put_back() -> None:
    config = transformers.BigBirdConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, block_size=4,
        max_position_embeddings=128, num_random_blocks=1, sep_token_id=3,
    )  # fmt: skip
    model = transformers.BigBirdForMaskedLM(config)
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(SiteError, match=r"another module for bert\.encoder\.layer\.0\.attention\.self .*original_full"):
        find_sites(model)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert model.bert.attention_type == "block_sparse"
    ids = torch.randint(5, 60, (1, 64))
    schedule = DropoutSchedule.uniform(model, 0.3, inputs={"input_ids": ids})
    with apply_dropout(model, schedule, inputs={"input_ids": ids}):
        assert model.bert.embeddings.dropout.p == 0.3


def test_all_owners_of_a_shared_dropout_feed_its_site() -> None:
    model = language_model("bert")
    for layer in model.bert.encoder.layer:
        layer.output.dropout = model.bert.encoder.layer[0].output.dropout
    site = next(site for site in find_sites(model) if site.path == "bert.encoder.layer.0.output.dropout")
    assert site.calls == 2
    assert {name.split(".")[3] for name in site.parameters} == {"0", "1"}


def test_parts_that_the_tiny_batch_leaves_out_get_rates_by_inputs_that_run_them() -> None:
    model = language_model("gpt2", add_cross_attention=True)
    inputs = {"input_ids": torch.arange(6).reshape(1, 6), "encoder_hidden_states": torch.randn(1, 4, 16)}
    crossed = [site.path for site in find_sites(model, inputs) if "crossattention" in site.path]
    assert len(crossed) == 4
    plain = DropoutSchedule.uniform(model, 0.0)
    assert not set(plain.rates) & set(crossed)
    with pytest.raises(ScheduleError, match=r"no rate for .*crossattention"):
        apply_dropout(model, plain, inputs=inputs)
    guided = DropoutSchedule.from_profile(profile_of(model), model, inputs=inputs)
    for schedule in (
        DropoutSchedule.uniform(model, 0.0, inputs=inputs),
        DropoutSchedule.from_rates(dict.fromkeys(guided.rates, 0.2), model, inputs=inputs),
        controls.magnitude(guided, model, inputs=inputs),
        guided,
    ):
        with apply_dropout(model, schedule, inputs=inputs):
            assert all(model.get_submodule(path).p == schedule.rates[path] for path in crossed)


def test_a_schedule_whose_profile_is_of_other_weights_says_so_on_every_model() -> None:
    measured, other = language_model("bert", seed=0), language_model("bert", seed=1)
    digest = weights_digest(dict(measured.named_parameters()))
    profile = profile_of(measured)
    profile = replace(profile, model={**profile.model, "digest": digest})
    assert profile.has_weights_of(measured)
    assert DropoutSchedule.from_profile(profile, measured).weights_note(measured) is None
    schedule = DropoutSchedule.from_profile(profile, other)
    for model in (measured, other):
        assert "scores are of other weights" in (schedule.weights_note(model) or "")
