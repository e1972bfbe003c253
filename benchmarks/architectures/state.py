"""Whether a model comes back as it was."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

_PLAIN = (bool, int, float, str, type(None))


def snapshot(model: PreTrainedModel) -> dict[str, Any]:
    """All tensors bit for bit, the configuration, and each module's plain attributes (rates, training flags)."""
    state: dict[str, Any] = {f"state_dict {name}": _bits(tensor) for name, tensor in model.state_dict().items()}
    state |= {f"buffer {name}": _bits(tensor) for name, tensor in model.named_buffers()}
    state |= {f"requires_grad {name}": p.requires_grad for name, p in model.named_parameters()}
    state |= {f"config {key}": copy.deepcopy(value) for key, value in model.config.to_dict().items()}
    for path, module in model.named_modules():
        plain = {key: value for key, value in vars(module).items() if isinstance(value, _PLAIN)}
        state[f"module {path}"] = (id(module), type(module), len(module._forward_hooks), repr(sorted(plain.items())))
    return state


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What differs between two snapshots, by name."""
    return sorted(key for key in {*before, *after} if key not in before or before[key] != after.get(key))


def _bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes()
