"""Which of a model's parameters are pretrained, where they started from, and what a profile knows of them."""

from __future__ import annotations

import re

from torch import Tensor, nn

from guided_dropout.adapters import adapter_parts
from guided_dropout.errors import ModelError, ScheduleError
from guided_dropout.fisher.profile import FisherProfile
from guided_dropout.identity import backbone_name, has_head, in_head, model_identity, relative_name, unwrapped
from guided_dropout.regularizers.base import Context
from guided_dropout.regularizers.layers import stack_entries


def pretrained_parameters(model: nn.Module, context: Context) -> dict[str, nn.Parameter]:
    """Name → each trainable parameter that holds pretrained weights.

    Raises:
        ModelError: there is none.
    """
    new = new_parameters(model, context)
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
    adapters = adapter_parts(model) if context.new is None else ()
    return {
        n: p
        for n, p in model.named_parameters()
        if p.requires_grad and (is_new(model, n, context) or n.startswith(adapters))
    }


def is_new(model: nn.Module, name: str, context: Context) -> bool:
    """Whether the parameter, which is no adapter's, is not pretrained.

    Raises:
        ModelError: that is not known: a classifier that does not say which of its parts is the backbone.
    """
    if context.new is not None:
        return name in context.new
    kind = type(unwrapped(model)).__name__
    if re.search(r"For\w*(Classification|Choice|QuestionAnswering)$", kind) and not has_head(model):
        raise ModelError(
            f"{kind} does not say which of its parts is the backbone, so that its new head would pass for pretrained; "
            "expected the names of what is new: give Context(new={...}), as load_classifier or the checkpoint's "
            "missing keys tell them"
        )
    return in_head(model, name)


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
    names = {backbone_name(model, name): name for name, _ in model.named_parameters() if not in_head(model, name)}
    added = adapter_parts(model)
    names = {name: own for name, own in names.items() if name in held or not own.startswith(added)}
    lost = [name for name in held if name not in names]
    # Without a prefix a language model's head stands in the same namespace as its backbone.
    if lost and (prefix or len(lost) == len(held)):
        raise _another(f"it holds {lost[0]}, {type(model).__name__} does not")
    layers = tuple(f"{path}." for path in stack_entries(model))
    for name, own_name in names.items():
        if name not in held and own_name.startswith(layers):
            raise _another(f"it does not hold {name}")
    names = {name: own_name for name, own_name in names.items() if name in held}
    for name, own_name in names.items():
        shape, own = profile.shapes[held[name]], tuple(model.get_parameter(own_name).shape)
        if shape != own:
            raise _another(f"{name} is {list(shape)} in the profile, {list(own)} in the model")
    return {own_name: held[name] for name, own_name in names.items()}


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
