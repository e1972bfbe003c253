"""Which of a model's parameters to measure, and what to run when adapters are wrapped around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from guided_dropout.adapters import adapter_parts
from guided_dropout.errors import ModelError
from guided_dropout.identity import unwrapped

# Which parameters: one of these names, or a function of a parameter's name and itself.
CHOICES = ("all", "trainable", "base")
Choice = str | Callable[[str, nn.Parameter], bool]
MEASURED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_UNQUANTISED = "load it unquantised, or measure what requires a gradient alone (--parameters trainable)"


def select_parameters(model: nn.Module, choice: Choice = "all") -> dict[str, nn.Parameter]:
    """The parameters of `model` to measure, by their names in ``model.named_parameters()``.

    Args:
        model: any model, with adapters or without.
        choice: ``"all"``; ``"trainable"``: those that require a gradient, with adapters mostly theirs alone;
            ``"base"``: those that no adapter has brought; or a function (name, parameter) → bool.

    Raises:
        ModelError: no such choice, it leaves no parameter, or one of another type than those of `MEASURED`.
    """
    chosen = choice if callable(choice) else _named(model, choice)
    wanted = {n: p for n, p in model.named_parameters() if chosen(n, p)}
    if not wanted:
        what = "the given function" if callable(choice) else repr(choice)
        raise ModelError(
            f"{what} leaves none of the parameters of {type(model).__name__}; expected at least one: choose others"
        )
    _check_types(model, wanted)
    if choice in ("all", "base"):
        _check_whole(model)
    return wanted


def _check_types(model: nn.Module, wanted: Mapping[str, nn.Parameter]) -> None:
    odd = [name for name, p in wanted.items() if p.dtype not in MEASURED]
    if odd:
        raise ModelError(
            f"{len(odd)} of the {len(wanted)} parameters to measure of {type(model).__name__} have no derivative, "
            f"{odd[0]} of {_name(wanted[odd[0]].dtype)} among them; expected {', '.join(map(_name, MEASURED))}: "
            f"{_UNQUANTISED}"
        )


def _check_whole(model: nn.Module) -> None:
    # Some keep their quantised weights where no parameter shows them.
    if getattr(unwrapped(model), "is_quantized", False):
        raise ModelError(
            f"{type(model).__name__} has quantised weights; expected a model with all of them: {_UNQUANTISED}"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _named(model: nn.Module, choice: str) -> Callable[[str, nn.Parameter], bool]:
    if choice == "all":
        return lambda *_: True
    if choice == "trainable":
        return lambda _, parameter: parameter.requires_grad
    if choice == "base":
        added = adapter_parts(model, copies=True)
        return lambda name, _: not name.startswith(added)
    raise ModelError(f"parameters {choice!r}; expected one of {', '.join(CHOICES)}, or a function")


def without_wrapper(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model, its adapters in its layers; any other model as it is.

    Raises:
        ModelError: the adapter is a prompt, which only the wrapper adds.
    """
    inner = unwrapped(model)
    if inner is not model and getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ModelError(
            f"{type(model).__name__} learns a prompt; expected adapters inside the layers, such as LoRA: "
            "measure the base model instead"
        )
    return inner
