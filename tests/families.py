"""Tiny random models of the families that the package is proved on.

Each is built from its configuration alone in milliseconds, with seeded weights, fewer than 100,000 parameters and
non-zero dropout wherever the family has any.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from guided_dropout.fisher.profile import FisherProfile
from guided_dropout.identity import model_identity, weights_identity

VOCAB = 64
_TOKENS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ENCODER = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.2,
}
_LLAMA = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "attention_dropout": 0.2,
}
_OPTIONS: dict[str, dict[str, Any]] = {
    "bert": _ENCODER,
    "roberta": _ENCODER,
    "electra": {**_ENCODER, "embedding_size": 8},
    "albert": {**_ENCODER, "embedding_size": 8},
    "deberta-v2": {
        **_ENCODER,
        "relative_attention": True,
        "position_buckets": 8,
        "pos_att_type": ["p2c", "c2p"],
        "norm_rel_ebd": "layer_norm",
    },
    "modernbert": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 32,
        "local_attention": 8,
        "cls_token_id": 1,
        "sep_token_id": 2,
        "embedding_dropout": 0.1,
        "mlp_dropout": 0.1,
        "attention_dropout": 0.2,
    },
    "distilbert": {
        "dim": 16,
        "n_layers": 2,
        "n_heads": 2,
        "hidden_dim": 24,
        "max_position_embeddings": 32,
        "dropout": 0.1,
        "attention_dropout": 0.2,
    },
    "gpt2": {
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 32,
        "embd_pdrop": 0.1,
        "resid_pdrop": 0.1,
        "attn_pdrop": 0.2,
    },
    "gpt_neox": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 32,
        "hidden_dropout": 0.1,
        "attention_dropout": 0.2,
    },
    "opt": {
        "hidden_size": 16,
        "word_embed_proj_dim": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "ffn_dim": 24,
        "max_position_embeddings": 32,
        "dropout": 0.1,
        "attention_dropout": 0.2,
        "layerdrop": 0.0,
    },
    "llama": _LLAMA,
    "qwen3": {**_LLAMA, "head_dim": 8},
    "t5": {
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 2,
        "num_heads": 2,
        "dropout_rate": 0.1,
        "decoder_start_token_id": 0,
    },
    "bart": {
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "max_position_embeddings": 32,
        "dropout": 0.1,
        "attention_dropout": 0.2,
        "activation_dropout": 0.1,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": 2,
    },
}
_DECODER = {**_LLAMA, "attention_dropout": 0.2}
_BART = {**_OPTIONS["bart"], "pad_token_id": 0}
# Of those whose dropout sites are not proven yet.
_FISHER_ONLY_OPTIONS: dict[str, dict[str, Any]] = {
    "phi3": {**_LLAMA, "resid_pdrop": 0.1, "embd_pdrop": 0.1},
    "gemma": {**_LLAMA, "head_dim": 8},
    "gemma2": {**_LLAMA, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "mistral": {**_LLAMA, "sliding_window": 8},
    "mixtral": {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        **_LLAMA,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
    },
    "falcon": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "ffn_hidden_size": 24,
        "hidden_dropout": 0.1,
        "attention_dropout": 0.2,
    },
    "bloom": {
        "hidden_size": 16,
        "n_layer": 2,
        "n_head": 2,
        "hidden_dropout": 0.1,
        "attention_dropout": 0.2,
    },
    "mpt": {
        "d_model": 16,
        "n_layers": 2,
        "n_heads": 2,
        "expansion_ratio": 2,
        "max_seq_len": 32,
        "emb_pdrop": 0.1,
        "resid_pdrop": 0.1,
    },
    "mamba": {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 4},
    "xlnet": {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24, "dropout": 0.1},
    "longformer": {**_ENCODER, "attention_window": 16},
    "mt5": {**_OPTIONS["t5"], "num_decoder_layers": 2},
    "pegasus": _BART,
}
_MASKED = {"bert", "roberta", "electra", "albert", "deberta-v2", "modernbert", "distilbert", "longformer"}
# XLNet predicts each token from the others, as a masked language model does, though it is loaded as a causal one.
_UNSHIFTED = {*_MASKED, "xlnet"}
_SEQ2SEQ = {"t5", "bart", "mt5", "pegasus"}
# Their norms or softmax compute in float32 whatever the model is in.
PARTLY_FLOAT32 = {"gemma", "gemma2", "longformer", "mamba", "mpt"}


def objective_of(family: str) -> str:
    """``"mlm"``, ``"causal"`` or ``"seq2seq"``."""
    return "mlm" if family in _UNSHIFTED else "seq2seq" if family in _SEQ2SEQ else "causal"


def config_of(family: str, **overrides: Any) -> PreTrainedConfig:
    """The tiny configuration of a family, with `overrides`."""
    return AutoConfig.for_model(family, **{**_TOKENS, **{**_OPTIONS, **_FISHER_ONLY_OPTIONS}[family], **overrides})


def language_model(
    family: str, *, attn_implementation: str | None = None, seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    """The language model of a family in evaluation mode, weights drawn by `seed`."""
    auto = (
        AutoModelForMaskedLM
        if family in _MASKED
        else AutoModelForSeq2SeqLM
        if family in _SEQ2SEQ
        else AutoModelForCausalLM
    )
    return _build(auto, config_of(family, **overrides), attn_implementation, seed)


def classifier_of(
    family: str, *, attn_implementation: str | None = None, seed: int = 1, num_labels: int = 2, **overrides: Any
) -> PreTrainedModel:
    """The sequence-classification model around the same backbone configuration, in evaluation mode."""
    config = config_of(family, num_labels=num_labels, **overrides)
    return _build(AutoModelForSequenceClassification, config, attn_implementation, seed)


def _build(auto: Any, config: PreTrainedConfig, attn_implementation: str | None, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return auto.from_config(config, attn_implementation=attn_implementation).eval()


FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {family: partial(language_model, family) for family in _OPTIONS}
FISHER_ONLY: dict[str, Callable[..., PreTrainedModel]] = {
    family: partial(language_model, family) for family in _FISHER_ONLY_OPTIONS
}


def profile_of(model: nn.Module, **means: float) -> FisherProfile:
    """A profile with made-up means: each tensor's is its place among the parameters, from 1."""
    names = [name for name, _ in model.named_parameters()]
    tensor_means = {name: float(i + 1) for i, name in enumerate(names)} | means
    return FisherProfile(
        diagonal={n: torch.full(p.shape, tensor_means[n]) for n, p in model.named_parameters()},
        tensor_means=tensor_means,
        num_samples=8,
        num_skipped=0,
        objective="mlm",
        reduction="mean",
        model=model_identity(model),
    )


def measured_on(model: nn.Module) -> FisherProfile:
    """Likewise, and it knows the weights of `model`, as a profile that was measured does."""
    known = weights_identity(model, [name for name, _ in model.named_parameters()])
    return replace(profile_of(model), model={**model_identity(model), **known})
