"""Which of a model's parameters to measure, and what to run when adapters are wrapped around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from guided_dropout.errors import ModelError

# Which parameters: one of these names, or a function of a parameter's name and itself.
CHOICES = ("all", "trainable", "base")
Choice = str | Callable[[str, nn.Parameter], bool]


def select_parameters(model: nn.Module, choice: Choice = "all") -> dict[str, nn.Parameter]:
    """The floating-point parameters of `model` to measure, by their names in ``model.named_parameters()``.

    Args:
        model: any model, with adapters or without.
        choice: ``"all"``; ``"trainable"``: those that require a gradient, with adapters mostly theirs alone;
            ``"base"``: those that no adapter has brought; or a function (name, parameter) → bool.

    Raises:
        ModelError: no such choice, or it leaves no parameter.
    """
    if not callable(choice) and choice not in CHOICES:
        raise ModelError(f"parameters {choice!r}; expected one of {', '.join(CHOICES)}, or a function")
    added = _brought_by_adapters(model) if choice == "base" else []
    wanted = {
        n: p
        for n, p in model.named_parameters()
        if p.is_floating_point()
        and (
            choice(n, p)
            if callable(choice)
            else p.requires_grad
            if choice == "trainable"
            else not n.startswith(tuple(added))
            if added
            else True
        )
    }
    if not wanted:
        what = "the given function" if callable(choice) else repr(choice)
        raise ModelError(
            f"{what} leaves none of the parameters of {type(model).__name__}; expected at least one: choose others"
        )
    return wanted


def _brought_by_adapters(model: nn.Module) -> list[str]:
    """Beginnings of the names of what PEFT has added to a model's layers."""
    added = []
    for path, module in model.named_modules():
        names: Any = getattr(module, "adapter_layer_names", ())
        names = names if isinstance(names, (tuple, list)) else ()
        if isinstance(getattr(module, "modules_to_save", None), nn.ModuleDict):
            names = (*names, "modules_to_save")
        added += [f"{path}.{name}." for name in names]
    return added


def without_wrapper(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model, its adapters in its layers; any other model as it is.

    Raises:
        ModelError: the adapter is a prompt, which only the wrapper adds.
    """
    inner = getattr(model, "get_base_model", None)
    if inner is None or not hasattr(model, "peft_config"):
        return model
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ModelError(
            f"{type(model).__name__} learns a prompt; expected adapters inside the layers, such as LoRA: "
            "measure the base model instead"
        )
    return inner()
