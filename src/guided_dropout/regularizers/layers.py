"""How deep each parameter lies, found by running the model: in which order are its layers used?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from guided_dropout.errors import ModelError
from guided_dropout.identity import in_head
from guided_dropout.knobs import find_knobs
from guided_dropout.probe import ParameterUses, run_once, turned


@dataclass(frozen=True)
class Layers:
    """A model's layers in the order of their first use.

    Attributes:
        blocks: path of each layer: the entries of the backbone's outermost lists of modules.
        depth: name of each parameter → its depth. A layer's parameters have its place, from 1; those outside of all
            layers the number of layers begun before their first use: 0 for embeddings, ``len(blocks) + 1`` for what
            follows the last layer and for the head.
    """

    blocks: tuple[str, ...]
    depth: Mapping[str, int]

    @property
    def top(self) -> int:
        """The depth of the head."""
        return len(self.blocks) + 1


def find_layers(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> Layers:
    """Run the model once and see in which order its layers are used.

    Args:
        model: any model; it is left as it was.
        inputs: keyword arguments of its forward; a tiny batch made from its configuration by default.

    Raises:
        ModelError: no list of layers in the backbone.
        SiteError: the model does not run on the tiny batch.
    """
    stacks = tuple(f"{path}." for path in stack_entries(model))
    begun: list[str] = []
    outside: dict[str, int] = {}
    order = parameters_in_order(model, inputs)
    for name in order:
        block = next((stack for stack in stacks if name.startswith(stack)), None)
        if block is None:
            outside[name] = len(begun)
        elif block not in begun:
            begun.append(block)
    if not begun:
        raise ModelError(
            f"{type(model).__name__} has no list of layers in its backbone; expected a torch.nn.ModuleList of them: "
            "choose a regularizer that does not go by layers"
        )
    top = len(begun) + 1

    def depth(name: str) -> int:
        place = next((k for k, block in enumerate(begun, start=1) if name.startswith(block)), None)
        if place is None:
            place = outside.get(name, top)
            return top if in_head(model, name) or place == len(begun) else place
        return place

    return Layers(tuple(b.rstrip(".") for b in begun), {name: depth(name) for name, _ in model.named_parameters()})


def parameters_in_order(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> list[str]:
    """Names of the parameters that one forward uses, in the order of their first use; nothing drops meanwhile.

    Raises:
        SiteError: as for `find_layers`.
    """
    uses = ParameterUses(model)
    still = (turned(knob, 0.0) for knob in find_knobs(model).values())  # layer drop too
    run_once(model, inputs, *still, uses)
    return list(uses.used)


def stack_entries(model: nn.Module) -> Iterator[str]:
    """Paths of the entries of the outermost module lists of the backbone that hold parameters."""
    lists: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or in_head(model, path) or path.startswith(tuple(lists)):
            continue
        lists.append(f"{path}.")
        for name, entry in module.named_children():
            if next(entry.parameters(), None) is not None:
                yield f"{path}.{name}"
