"""Which of a model's parameters are pretrained, where they started from, and what a profile knows of them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from guided_dropout.adapters import adapter_parts
from guided_dropout.errors import ModelError, ScheduleError
from guided_dropout.fisher.profile import FisherProfile
from guided_dropout.identity import (
    backbone_name,
    has_head,
    in_head,
    is_packed,
    model_identity,
    names_before,
    relative_name,
    unwrapped,
)
from guided_dropout.regularizers.base import Context
from guided_dropout.regularizers.layers import outputs_of, stack_entries

_TOKENS = "trainable_tokens_delta"  # PEFT's rows of tokens that train, which a tiny batch need not hold


def pretrained_parameters(model: nn.Module, context: Context) -> dict[str, nn.Parameter]:
    """Name → each trainable parameter that holds pretrained weights.

    Raises:
        ModelError: there is none.
    """
    new = _all_new(model, context)
    found = {n: p for n, p in model.named_parameters() if p.requires_grad and n not in new}
    if not found:
        expected = "expected a pretrained backbone: load a checkpoint, or unfreeze it"
        if adapter_parts(model):
            expected = "what adapters add is new; expected some: unfreeze pretrained layers, or train without adapters"
        raise ModelError(f"{type(model).__name__} has no trainable parameter with pretrained weights; {expected}")
    return found


def new_parameters(model: nn.Module, context: Context) -> dict[str, nn.Parameter]:
    """Name → each trainable parameter that was drawn for the task.

    That is the head's, adapters' and what the checkpoint lacked, or what the context says.
    """
    new = _all_new(model, context)
    return {n: p for n, p in model.named_parameters() if p.requires_grad and n in new}


def _all_new(model: nn.Module, context: Context) -> set[str]:
    adapters = adapter_parts(model) if context.new is None else ()
    return new_names(model, context) | {n for n, _ in model.named_parameters() if n.startswith(adapters)}


def vital_of_adapters(model: nn.Module, context: Context, parameters: Mapping[str, nn.Parameter]) -> set[str]:
    """Names of those that adapters brought and without which, at 0, the model would compute something else now.

    The model is run once for each kind (all of LoRA's A, all of DoRA's magnitudes).

    Raises:
        SiteError: the model does not run on the tiny batch.
    """
    kinds: dict[str, list[str]] = {}
    parts = adapter_parts(model)
    for name in parameters:
        if part := next((part for part in parts if name.startswith(part)), None):
            kinds.setdefault(part[:-1].rpartition(".")[2], []).append(name)
    vital: set[str] = set()
    if kinds:
        now = outputs_of(model, context.inputs)
        for names in kinds.values():
            own = {name: parameters[name].data for name in names}
            try:
                for name, values in own.items():
                    parameters[name].data = torch.zeros_like(values)
                without = outputs_of(model, context.inputs)
            finally:
                for name, values in own.items():
                    parameters[name].data = values
            if not all(map(torch.equal, now, without)):
                vital.update(names)
        vital.update(kinds.get(_TOKENS, ()))
    return vital


def new_names(model: nn.Module, context: Context) -> set[str]:
    """Names of the parameters that are not pretrained; an adapter's are among them where the context says so.

    Raises:
        ModelError: that is not known: a classifier that does not say which of its parts is the backbone, or names in
            the context that the model has not.
    """
    if context.new is not None:
        return _named(model, context.new)
    kind = type(unwrapped(model)).__name__
    if re.search(r"For\w*(Classification|Choice|QuestionAnswering)$", kind) and not has_head(model):
        raise ModelError(
            f"{kind} does not say which of its parts is the backbone, so that its new head would pass for pretrained; "
            "expected the names of what is new: give Context(new={...}), as load_classifier or the checkpoint's "
            "missing keys tell them"
        )
    return {name for name, _ in model.named_parameters() if in_head(model, name)}


def _named(model: nn.Module, given: Collection[str]) -> set[str]:
    """The model's parameters with these names, which they have now or had before PEFT wrapped it."""
    tensors = itertools.chain(model.named_parameters(remove_duplicate=False), model.named_buffers())
    before = names_before(model, (name for name, _ in tensors))
    if unknown := sorted(set(given) - before.keys() - set(before.values())):
        raise ModelError(
            f"Context(new=...) names {unknown[0]!r}, which {type(model).__name__} has not; expected names that "
            "named_parameters() gives, here or before PEFT wrapped the model: check the spelling"
        )
    return {name for name, _ in model.named_parameters() if name in given or before[name] in given}


def measured_names(model: nn.Module, profile: FisherProfile) -> dict[str, str]:
    """Name of each of the backbone's parameters that the profile holds → its name there.

    A parameter outside of the layers that the profile does not hold (BERT's pooler, which no masked LM has) is not
    among them: the loss that the profile was measured with does not depend on it, so that its information there is 0.

    Raises:
        ScheduleError: a profile of another model.
    """
    found, expected = profile.model.get("model_type"), model_identity(model)["model_type"]
    if found != expected:
        raise _another(f"its model type is {found!r}, {type(model).__name__}'s is {expected!r}")
    prefix = profile.model.get("backbone_prefix", "")
    held = {relative_name(name, prefix): name for name in profile.shapes if name.startswith(prefix)}
    added = adapter_parts(model)
    # A layer that PEFT has copied (modules_to_save) and its copies have one name.
    names = {own: backbone_name(model, own) for own, _ in model.named_parameters() if not in_head(model, own)}
    names = {own: name for own, name in names.items() if name in held or not own.startswith(added)}
    here = set(names.values())
    lost = [name for name in held if name not in here]
    # Without a prefix a language model's head stands in the same namespace as its backbone.
    if lost and (prefix or len(lost) == len(held)):
        raise _another(f"it holds {lost[0]}, {type(model).__name__} does not")
    layers = tuple(f"{path}." for path in stack_entries(model))
    for own, name in names.items():
        if name not in held and own.startswith(layers):
            raise _another(f"it does not hold {name}")
    names = {own: name for own, name in names.items() if name in held}
    for own, name in names.items():
        shape, parameter = profile.shapes[held[name]], model.get_parameter(own)
        if shape != tuple(parameter.shape) and not is_packed(parameter):
            raise _another(f"{name} is {list(shape)} in the profile, {list(parameter.shape)} in the model")
    return {own: held[name] for own, name in names.items()}


def fisher_of(model: nn.Module, profile: FisherProfile, what: str) -> dict[str, Tensor]:
    """Name on this model → its diagonal Fisher information, a tensor of the parameter's shape; see `measured_names`.

    Args:
        model: with the profile's backbone.
        profile: with a value for each parameter.
        what: what needs them, in the plural, for the message.

    Raises:
        ScheduleError: a profile of another model.
        ArtefactError: a profile of means only.
    """
    names, values = measured_names(model, profile), profile.values(what)
    return {name: values[there] for name, there in names.items()}


def _another(difference: str) -> ScheduleError:
    return ScheduleError(f"a profile of another model: {difference}; expected the same backbone: estimate one of this")
