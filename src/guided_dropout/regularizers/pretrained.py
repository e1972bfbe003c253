"""Which of a model's parameters are pretrained, where they started from, and what a profile knows of them."""

from __future__ import annotations

from torch import Tensor, nn

from guided_dropout.errors import ModelError, ScheduleError
from guided_dropout.fisher.profile import FisherProfile
from guided_dropout.identity import backbone_name, in_head, model_identity
from guided_dropout.regularizers.base import Context
from guided_dropout.regularizers.layers import stack_entries


def pretrained_parameters(model: nn.Module, context: Context) -> dict[str, nn.Parameter]:
    """Name → each trainable parameter that holds pretrained weights.

    Raises:
        ModelError: there is none.
    """
    found = {n: p for n, p in model.named_parameters() if p.requires_grad and not is_new(model, n, context)}
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no trainable parameter with pretrained weights; expected a pretrained "
            "backbone: load a checkpoint, or unfreeze it"
        )
    return found


def new_parameters(model: nn.Module, context: Context) -> dict[str, nn.Parameter]:
    """Name → each trainable parameter that was drawn for the task: the head's, and what the checkpoint lacked."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad and is_new(model, n, context)}


def is_new(model: nn.Module, name: str, context: Context) -> bool:
    """Whether the parameter is not pretrained."""
    return in_head(model, name) if context.new is None else name in context.new


def fisher_of(model: nn.Module, profile: FisherProfile) -> dict[str, Tensor]:
    r"""Name on this model → its diagonal Fisher information, a tensor of the parameter's shape.

    A parameter outside of the layers that the profile does not hold (BERT's pooler, which no masked LM has) is not
    among them: the loss that the profile was measured with does not depend on it, so that its information there is 0.

    Raises:
        ScheduleError: a profile of another model, or one without its diagonal.
    """
    found, expected = profile.model.get("model_type"), model_identity(model)["model_type"]
    if found != expected:
        raise _another(f"its model type is {found!r}, {type(model).__name__}'s is {expected!r}")
    prefix = profile.model.get("backbone_prefix", "")
    held = {name.removeprefix(prefix): f for name, f in profile.diagonal.items() if name.startswith(prefix)}
    if not held:
        raise ScheduleError(
            "the profile holds no diagonal, only means; expected one value a parameter: estimate it whole"
        )
    names = {backbone_name(model, name): name for name, _ in model.named_parameters() if not in_head(model, name)}
    lost = [name for name in held if name not in names]
    # Without a prefix a language model's head stands in the same namespace as its backbone.
    if lost and (prefix or len(lost) == len(held)):
        raise _another(f"it holds {lost[0]}, {type(model).__name__} does not")
    layers = tuple(f"{path}." for path in stack_entries(model))
    for name, own_name in names.items():
        if name not in held and own_name.startswith(layers):
            raise _another(f"it does not hold {name}")
    for name in (name for name in names if name in held):
        shape, own = tuple(held[name].shape), tuple(model.get_parameter(names[name]).shape)
        if shape != own:
            raise _another(f"{name} is {list(shape)} in the profile, {list(own)} in the model")
    return {names[name]: f for name, f in held.items() if name in names}


def _another(difference: str) -> ScheduleError:
    return ScheduleError(f"a profile of another model: {difference}; expected the same backbone: estimate one of this")
