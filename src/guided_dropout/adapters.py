"""Adapters that PEFT has put into a model's layers: what they have added, and what the same thing was called before."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

_WRAPPERS = re.compile(r"\.(?:(?:token_adapter\.)?base_layer|original_module|modules_to_save\.[^.]+)(?=\.)")


def name_before(name: str) -> str:
    """``query.base_layer.weight`` → ``query.weight``: the name before adapters were put in; other names as they are."""
    return _WRAPPERS.sub("", f".{name}").removeprefix(".")


def adapter_parts(model: nn.Module, *, copies: bool = False) -> tuple[str, ...]:
    """Beginnings of the names of what adapters have added to a model's layers.

    Args:
        model: with adapters or without.
        copies: whether the copies of whole layers that are to be trained (``modules_to_save``) are among it.
    """
    parts: list[str] = []
    for path, module in model.named_modules():
        for attribute in ("adapter_layer_names", "other_param_names"):
            names: Any = getattr(module, attribute, ())
            if isinstance(names, tuple | list):
                parts += [f"{path}.{name}." for name in names if copies or name != "modules_to_save"]
    return tuple(parts)


def is_adapter(module: nn.Module) -> bool:
    """Whether the module is what an adapter has put around a layer."""
    return hasattr(module, "adapter_layer_names") and "base_layer" in module._modules


def is_adapted(model: nn.Module, path: str) -> bool:
    """Whether the module at `path` is a layer that an adapter adapts: what that adds to its output comes after it."""
    outer, _, name = path.rpartition(".")
    return name == "base_layer" and is_adapter(model.get_submodule(outer))


def adapted_layer(model: nn.Module, path: str) -> nn.Module | None:
    """The layer that the adapter which holds `path` adapts; None where `path` lies in no adapter."""
    module, adapted = model, None
    for part in path.split("."):
        child = module._modules.get(part)
        if child is None:
            break
        if is_adapter(module):
            base = module._modules["base_layer"]
            adapted = None if child is base else base
        module = child
    return adapted
