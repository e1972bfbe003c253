"""Which attention implementations take dropout, and plain ones in their place while a model is only watched."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from guided_dropout.identity import unwrapped

_OTHERS = ("flash", "flex")  # no PyTorch function of theirs shows its rate, and not every machine has their kernels


def takes_dropout(implementation: str) -> bool:
    """Whether dropout on attention probabilities is possible: with all but flex attention, which has no such kernel."""
    return "flex" not in implementation


def keeps_its_rate(implementation: str) -> bool:
    """Whether its dropout is inside of a kernel of its own, where nothing in Python sees or replaces it."""
    return any(kind in implementation for kind in _OTHERS)


def attention_implementations(model: nn.Module) -> set[str]:
    """The names that the configurations of the model and of its parts give."""
    names = (config._attn_implementation for config in _configs(model))
    return {name for name in names if isinstance(name, str)}


@contextlib.contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """Let flash and flex attention be PyTorch's own for a while; they are given the same rate by the same argument."""
    plain = "sdpa" if getattr(unwrapped(model), "_supports_sdpa", False) else "eager"
    with contextlib.ExitStack() as stack:
        for config in _configs(model):
            name = config._attn_implementation
            if isinstance(name, str) and keeps_its_rate(name):
                stack.callback(setattr, config, "_attn_implementation_internal", name)
                config._attn_implementation_internal = plain
        yield


@contextlib.contextmanager
def plain_experts(model: nn.Module) -> Iterator[None]:
    """Let transformers' mixtures of experts be a loop for a while: each an operation of its own, in any precision."""
    with contextlib.ExitStack() as stack:
        for config in _configs(model):
            if name := getattr(config, "_experts_implementation_internal", None):
                stack.callback(setattr, config, "_experts_implementation_internal", name)
                config._experts_implementation_internal = "eager"
        yield


def _configs(model: nn.Module) -> list[Any]:
    from transformers import PreTrainedConfig

    found = [vars(module).get("config") for module in model.modules()]
    found += [getattr(c, name, None) for c in found if c is not None for name in getattr(c, "sub_configs", {})]
    return list({id(config): config for config in found if isinstance(config, PreTrainedConfig)}.values())
