"""A batch as small as can be on which a transformers model runs, made from its configuration alone."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from guided_dropout.errors import SiteError
from guided_dropout.identity import unwrapped

_TOKENS = 6  # of the tiny batch: enough for any position table, too few for a window or a bucket to matter
_SAMPLES = 8000  # of raw sound: half a second, more than the receptive field of any feature extractor


def tiny_batch(model: nn.Module) -> dict[str, Tensor]:
    """One example for whatever the model's forward takes: ordinary tokens that end a sequence, a picture, or sound.

    Returns:
        The model's main input: ``input_ids`` [1, 6] int64 and an ``attention_mask`` of the same shape;
        ``pixel_values`` [1, channels, height, width], ``input_features`` [1, mel bins, frames] or ``input_values``
        [1, frames] (or [1, frames, mel bins]) in the model's precision, all of them zeros and ones. And
        ``decoder_input_ids`` [1, 6] int64 for an encoder with a decoder.

    Raises:
        SiteError: the model has no configuration, or takes another kind of input.
    """
    inner: Any = unwrapped(model)
    config, accepted = getattr(inner, "config", None), inspect.signature(inner.forward).parameters
    main = getattr(inner, "main_input_name", "input_ids")
    makers = {"pixel_values": _picture, "input_features": _mel, "input_values": _sound, "input_ids": None}
    cannot = SiteError(
        f"no batch can be made for {type(model).__name__}; expected a transformers model that takes "
        f"{', '.join(makers)}: pass inputs= that it runs on"
    )
    if config is None or main not in accepted or main not in makers:
        raise cannot
    first = next(inner.parameters())
    batch: dict[str, Tensor] = {}
    if (maker := makers[main]) is not None:
        shape = maker(inner, config)
        checks = torch.arange(math.prod(shape), device=first.device) % 2
        batch[main] = checks.reshape(shape).to(first.dtype)
    if main == "input_ids" or getattr(config, "is_encoder_decoder", False):
        try:
            table = inner.get_input_embeddings().weight
        except (NotImplementedError, AttributeError) as e:  # transformers' answers where there is no table, or several
            raise cannot from e
        ids = torch.tensor([_ordinary_tokens(config, len(table))], device=table.device)
        tokens = {"decoder_input_ids": ids} if main != "input_ids" else _text(config, ids)
        batch.update({name: tensor for name, tensor in tokens.items() if name in accepted})
    return batch


def _text(config: Any, ids: Tensor) -> dict[str, Tensor]:
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return batch | {"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else batch


def _picture(model: nn.Module, config: Any) -> tuple[int, ...]:
    size = _number(config, "image_size", 32)
    height, width = size if isinstance(size, tuple | list) else (size, size)
    return 1, _number(config, "num_channels", 3), height, width


def _mel(model: nn.Module, config: Any) -> tuple[int, ...]:
    """As many frames as the positions that come out of the model's convolutions in time."""
    bins = _number(config, "num_mel_bins", 80)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv1d)]
    frames = _number(config, "max_source_positions", 64) * math.prod(m.stride[0] for m in convolutions)
    return 1, bins, frames


def _sound(model: nn.Module, config: Any) -> tuple[int, ...]:
    bins = _number(config, "num_mel_bins", 0)
    return (1, _number(config, "max_length", 64), bins) if bins else (1, _SAMPLES)


def _number(config: Any, name: str, default: int) -> Any:
    """A number of the configuration or of a part of it."""
    for part in (config, *_parts(config)):
        if (value := getattr(part, name, None)) is not None:
            return value
    return default


def _parts(config: Any) -> Iterator[Any]:
    return (getattr(config, name) for name in getattr(config, "sub_configs", {}) if getattr(config, name, None))


def _ordinary_tokens(config: Any, vocabulary: int) -> list[int]:
    """Token ids without padding (heads look for the last real token), ending as BART's classifier wants it."""
    marks = {key: value for key, value in vars(config).items() if key.endswith("token_id")}
    special = {i for value in marks.values() for i in (value if isinstance(value, list) else [value])}
    ordinary = list(itertools.islice((i for i in range(vocabulary) if i not in special), _TOKENS)) or [0]
    ids = list(itertools.islice(itertools.cycle(ordinary), _TOKENS))
    eos = marks.get("eos_token_id")
    eos = eos[0] if isinstance(eos, list) else eos
    return ids if eos is None or not 0 <= eos < vocabulary else [*ids[:-1], eos]
