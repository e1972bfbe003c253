"""Tiny models with random weights, of any type that transformers knows for a kind."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    EncoderDecoderConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks.architectures.sizes import BY_NAME, BY_TYPE, DECODERS, SPECIAL

LARGEST = 5_000_000
"""Parameters; a type that stays larger with the values of these tables is not built."""
LABELS = 3
_LAYER_LISTS = ("layer_types", "mlp_layer_types", "layers_block_type")


@dataclass(frozen=True)
class Kind:
    """What a model is for.

    Attributes:
        title: in words.
        loader: its class of ``Auto`` models.
        types: the model types that transformers knows for it.
    """

    title: str
    loader: Any
    types: tuple[str, ...]


KINDS = {
    "causal": Kind("causal LM", AutoModelForCausalLM, tuple(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)),
    "masked": Kind("masked LM", AutoModelForMaskedLM, tuple(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)),
    "seq2seq": Kind(
        "sequence-to-sequence LM", AutoModelForSeq2SeqLM, tuple(auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
    ),
    "classifier": Kind(
        "sequence classifier",
        AutoModelForSequenceClassification,
        tuple(auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
    ),
}


class TooLargeError(Exception):
    """The tables leave a model too large to be tried."""


def build(kind: str, model_type: str) -> PreTrainedModel:
    """A model in float32 and evaluation mode; the same weights each time.

    Noise is added to all of them, since what is 0 or 1 at first (biases, norms) would hide mistakes.

    Raises:
        Exception: whatever transformers raises about the configuration, or `TooLargeError`.
    """
    config = tiny_config(kind, model_type)
    loader = KINDS[kind].loader
    with torch.device("meta"):
        size = sum(p.numel() for p in loader.from_config(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise TooLargeError(f"{size:,} parameters with the values of sizes.py; {LARGEST:,} at most are tried")
    torch.manual_seed(0)
    model = loader.from_config(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                p.add_(0.05 * torch.randn(p.shape, generator=generator).to(p))
    if hasattr(model, "set_default_language"):
        model.set_default_language(model.config.languages[0])
    return model


def tiny_config(kind: str, model_type: str) -> Any:
    """The type's configuration with the values of the tables.

    Lists that go by the number of layers need not fit other values: where the configuration does not take them, it is
    left to make them itself.
    """
    if model_type == "encoder-decoder":
        values = _tiny(BertConfig)
        config = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**values), BertConfig(**values))
        config.pad_token_id, config.decoder_start_token_id, config.eos_token_id = 0, 1, 2
        return config
    make = CONFIG_MAPPING[model_type]
    values = _tiny(make)
    if kind == "causal" and model_type in DECODERS:
        values["is_decoder"] = True
    if kind == "classifier":
        values["num_labels"] = LABELS
    keep: list[Callable[[str, Any], bool]] = [
        lambda name, value: True,
        lambda name, value: name not in _LAYER_LISTS,
        lambda name, value: not isinstance(value, list | tuple),
    ]
    for kept in keep[:-1]:
        try:
            return make(**{name: value for name, value in values.items() if kept(name, value)})
        except Exception:
            continue
    return make(**{name: value for name, value in values.items() if keep[-1](name, value)})


def _tiny(make: type[Any]) -> dict[str, Any]:
    """The values for a configuration of this class, and for those inside of it."""
    default = make()
    parts: Mapping[str, Any] = getattr(make, "sub_configs", None) or {}
    values: dict[str, Any] = {}
    for name, value in vars(default).items():
        if name.startswith("_") or name in parts:
            continue
        new = _tiny_value(name, value)
        if new is not None:
            values[name] = new
    for name in parts:
        part = getattr(default, name, None)
        if part is not None and hasattr(part, "model_type"):
            values[name] = {**_tiny(type(part)), **({"model_type": part.model_type} if part.model_type else {})}
    return {**values, **BY_TYPE.get(default.model_type, {})}


def _tiny_value(name: str, value: Any) -> Any:
    """The value for one key; None where its default stays."""
    if name in BY_NAME:
        if value is None and name not in SPECIAL:
            return None
        if isinstance(value, list | tuple) and name != "eos_token_id":
            return type(value)([BY_NAME[name]] * min(2, len(value)))
        return BY_NAME[name]
    if isinstance(value, float) and "drop" in name.lower():
        return 0.2 if "att" in name else 0.1
    if name in _LAYER_LISTS and isinstance(value, list | tuple) and value:
        different = list(dict.fromkeys(value))
        return (different * 2)[:2]
    if isinstance(value, list | tuple) and len(value) > 8 and name.endswith(("layers", "ratios", "pattern")):
        return list(value[:2])
    return None
