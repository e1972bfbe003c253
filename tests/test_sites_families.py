"""Dropout sites of every family, of pictures and sound too, in each precision and attention implementation."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import transformers as hf
from families import _FISHER_ONLY_OPTIONS, FAMILIES, language_model
from torch import nn

from guided_dropout.errors import SiteError
from guided_dropout.knobs import find_knobs
from guided_dropout.regularizers import apply_dropout
from guided_dropout.schedule import DropoutSchedule
from guided_dropout.sites import find_sites, trace
from guided_dropout.tiny_batch import tiny_batch

_SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.2,
}
_WHISPER = {
    **{"vocab_size": 64, "d_model": 16, "num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 32},
    **{"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2},
    **{"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "dropout": 0.1, "attention_dropout": 0.2},
    **{"activation_dropout": 0.1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
    **{"suppress_tokens": None, "begin_suppress_tokens": None},
}
_WAV2VEC2 = {
    **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 32},
    **{"conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2},
    **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False, "layerdrop": 0.0},
}
_AST = {**_SMALL, "max_length": 32, "num_mel_bins": 16, "patch_size": 8, "frequency_stride": 8, "time_stride": 8}
SENSES = {
    "vit": (hf.AutoModelForImageClassification, hf.ViTConfig(**_SMALL, image_size=16, patch_size=8)),
    "whisper": (hf.AutoModelForSpeechSeq2Seq, hf.WhisperConfig(**_WHISPER)),
    "wav2vec2": (hf.AutoModelForCTC, hf.Wav2Vec2Config(**_WAV2VEC2)),
    "audio-spectrogram-transformer": (hf.AutoModelForAudioClassification, hf.ASTConfig(**_AST)),
}
SITES = {  # of two layers, counted by reading the models' code: (sites, calls, on attention, dead knobs)
    "phi3": (6, 6, 2, 0),
    "gemma": (2, 2, 2, 0),
    "gemma2": (2, 2, 2, 0),
    "mistral": (2, 2, 2, 0),
    "mixtral": (2, 2, 2, 0),
    "qwen2_moe": (2, 2, 2, 0),
    "falcon": (2, 2, 0, 8),  # attention drops with ALiBi only; a layer reads its rate from the shared configuration
    "bloom": (6, 6, 2, 2),
    "mpt": (6, 6, 2, 2),
    "mamba": (0, 0, 0, 0),
    "xlnet": (5, 11, 2, 2),  # one for both streams and the relative positions
    "longformer": (7, 7, 2, 0),
    "mt5": (22, 24, 6, 0),
    "pegasus": (16, 22, 6, 2),
    "vit": (5, 7, 2, 0),
    "whisper": (16, 22, 6, 2),
    "wav2vec2": (11, 11, 2, 0),
    "audio-spectrogram-transformer": (5, 7, 2, 0),
}


def build(family: str, attn: str | None = None) -> hf.PreTrainedModel:
    if family not in SENSES:
        return language_model(family, attn_implementation=attn)
    auto, config = SENSES[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return auto.from_config(config, attn_implementation=attn).eval()


def attention_of(family: str) -> list[str]:
    return ["eager", "sdpa"] if build(family)._supports_sdpa else ["eager"]


@pytest.mark.parametrize("family", SITES)
def test_each_dropout_call_has_a_site_in_both_attention_implementations(family: str) -> None:
    for attn in attention_of(family):
        seen = trace(build(family, attn))
        attention = sum(site.kind == "attention" for site in seen.sites)
        assert (len(seen.sites), len(seen.calls), attention, len(seen.dead)) == SITES[family]
        assert sum(site.calls for site in seen.sites) == len(seen.calls)
        assert all(site.parameters and site.dataflow for site in seen.sites)


def test_every_family_is_among_them() -> None:
    assert {*_FISHER_ONLY_OPTIONS, *SENSES} == {*SITES}


@pytest.mark.parametrize("family", [family for family in SITES if family != "mamba"])
def test_a_site_is_where_dropout_really_happens(family: str) -> None:
    """Independent of the probe: with one site's rate at 0.5 and all others at 0, two runs differ; with all at 0 not."""
    model = build(family).train()
    torch.manual_seed(1)
    batch = {name: torch.randn_like(x) if x.is_floating_point() else x for name, x in tiny_batch(model).items()}
    _initialise(model)

    def noisy() -> bool:
        torch.manual_seed(0)
        with torch.no_grad():
            return not torch.equal(model(**batch).logits, model(**batch).logits)

    knobs = find_knobs(model)
    sites = [knobs[site.path] for site in find_sites(model)]
    for knob in [*sites, *(knobs[path] for path in trace(model).dead)]:
        knob.turn(0.0)
    assert not noisy()
    for knob in sites:
        knob.turn(0.5)
        assert noisy()
        knob.turn(0.0)


def _initialise(model: nn.Module) -> None:
    """Some heads begin as zeros, behind which nothing can be seen."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", [*FAMILIES, *SITES])
def test_in_each_precision_the_sites_are_the_same_and_the_model_is_left_as_it_was(
    family: str, dtype: torch.dtype
) -> None:
    expected = [(site.path, site.kind, site.calls) for site in find_sites(build(family))]
    model = build(family).to(dtype)
    torch.manual_seed(5)
    before, states = state_of(model), random_states()
    assert [(site.path, site.kind, site.calls) for site in find_sites(model)] == expected
    assert state_of(model) == before
    assert random_states() == states


def state_of(model: nn.Module) -> list[object]:
    """Modes, rates, hooks, configurations and tensors (by identity and content)."""
    facts: list[object] = []
    for path, module in model.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str | None)}
        hooks = [len(value) for key, value in vars(module).items() if "hooks" in key]
        facts.append((path, id(module), plain, sorted(vars(module)), hooks))
        config = vars(module).get("config")
        facts.append((id(config), dict(vars(config)) if config is not None else None))
    tensors = model.state_dict(keep_vars=True).items()
    return [*facts, *((n, id(t), t.requires_grad, t.grad, t.double().sum().item()) for n, t in tensors)]


def random_states() -> list[object]:
    return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]


def test_a_rate_in_a_shared_configuration_is_set_for_one_layer_alone() -> None:
    model = build("falcon")
    first, second = (f"transformer.h.{i}.config.hidden_dropout" for i in (0, 1))
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    with apply_dropout(model, DropoutSchedule.from_rates({first: 0.3, second: 0.4}, model)):
        layers = model.transformer.h
        assert [layer.config.hidden_dropout for layer in layers] == [0.3, 0.4]
        assert [site.rate for site in find_sites(model)] == [0.3, 0.4]
        assert model.config.hidden_dropout == 0.1
    assert [id(module.config) for module in model.modules() if hasattr(module, "config")] == [id(c) for c in configs]
    assert all(config.hidden_dropout == 0.1 for config in configs)


def test_what_is_changed_in_a_shared_configuration_meanwhile_stays_and_reaches_the_layers() -> None:
    model = build("falcon")
    layers, config = model.transformer.h, model.config
    with apply_dropout(model, DropoutSchedule.uniform(model, 0.3)):
        config.layer_norm_epsilon = 0.5  # no rate
        assert layers[0].config is not config
    assert all(layer.config is config for layer in layers)
    assert (config.layer_norm_epsilon, config.hidden_dropout) == (0.5, 0.1)

    with apply_dropout(model, DropoutSchedule.uniform(model, 0.3)):
        config.hidden_dropout = 0.2  # the very rate
        find_sites(model)
        assert layers[0].config.hidden_dropout == 0.3
    assert all(layer.config is config for layer in layers)
    assert config.hidden_dropout == 0.2


def test_a_rate_that_is_zero_in_the_configuration_is_found_all_the_same() -> None:
    assert len(find_sites(language_model("falcon", hidden_dropout=0.0))) == 2


@pytest.mark.parametrize("family", [family for family in SITES if family != "mamba"])
def test_a_schedule_is_applied_and_taken_off(family: str) -> None:
    model = build(family)
    before = state_of(model)
    schedule = DropoutSchedule.uniform(model, 0.25, include_head=True)
    with apply_dropout(model, schedule):
        assert {site.rate for site in find_sites(model)} == {0.25}
    assert state_of(model) == before


def test_a_model_of_pictures_gets_a_picture_and_one_of_sound_gets_sound() -> None:
    assert {name: tuple(x.shape) for name, x in tiny_batch(build("vit")).items()} == {"pixel_values": (1, 3, 16, 16)}
    batch = {name: tuple(x.shape) for name, x in tiny_batch(build("whisper")).items()}
    assert batch == {"input_features": (1, 8, 24), "decoder_input_ids": (1, 6)}
    assert tiny_batch(build("vit").half())["pixel_values"].dtype == torch.float16


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn"])
def test_flash_attention_takes_dropout(implementation: str) -> None:
    """On a stand-in: this implementation's name on a model that was built with another."""
    model = language_model("llama")
    expected = find_sites(model)
    model.config._attn_implementation = implementation
    assert find_sites(model) == expected
    with apply_dropout(model, DropoutSchedule.uniform(model, 0.3)):
        assert [site.rate for site in find_sites(model)] == [0.3, 0.3]
    assert model.config._attn_implementation == implementation


def test_flex_attention_takes_no_dropout() -> None:
    model = language_model("phi3")
    model.config._attn_implementation = "flex_attention"
    before = [(site.path, site.rate) for site in find_sites(model)]
    rates = {site.path: 0.0 if site.kind == "attention" else 0.3 for site in find_sites(model)}
    with pytest.raises(SiteError, match=r"flex_attention.*self_attn.attention_dropout.*set_attn_implementation"):
        apply_dropout(model, DropoutSchedule.uniform(model, 0.3))
    assert [(site.path, site.rate) for site in find_sites(model)] == before
    with apply_dropout(model, DropoutSchedule.from_rates(rates, model)):
        assert [site.rate for site in find_sites(model)] == list(rates.values())
