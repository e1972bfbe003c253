"""How deep each parameter lies, found by running the model: in which order are its layers used?"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from guided_dropout.errors import ModelError
from guided_dropout.identity import in_head
from guided_dropout.knobs import find_knobs
from guided_dropout.probe import ParameterUses, run_once, tensors_in, turned


@dataclass(frozen=True)
class Layers:
    """A model's layers in the order of their first use.

    Attributes:
        blocks: path of each layer: the entries of the backbone's outermost lists of modules. Lists side by side whose
            entries are used in turn are one stack (XLM), with layers such as ``transformer.{attentions,ffns}.0``.
        block_of: name of each parameter in a layer → the layer's path in `blocks`.
        depth: name of each parameter → its depth. A layer's parameters have its place, from 1; those outside of all
            layers the number of layers begun before their first use: 0 for embeddings, ``len(blocks) + 1`` for what
            follows the last layer and for the head.
    """

    blocks: tuple[str, ...]
    block_of: Mapping[str, str]
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
    order = parameters_in_order(model, inputs)
    names = [name for name, _ in model.named_parameters()]
    stacks = [(entry, f"{entry}.") for entry in stack_entries(model)]
    entries = {name: entry for name in names for entry, start in stacks if name.startswith(start)}
    used = dict.fromkeys(entry for name in order if (entry := entries.get(name)))
    blocks = _blocks_of(model, list(used))
    begun: list[str] = []
    outside: dict[str, int] = {}
    for name in order:
        if name not in entries:
            outside[name] = len(begun)
        elif (block := blocks[entries[name]]) not in begun:
            begun.append(block)
    if not begun:
        raise ModelError(
            f"{type(model).__name__} has no list of layers in its backbone; expected a torch.nn.ModuleList of them: "
            "choose a regularizer that does not go by layers"
        )
    top = len(begun) + 1
    place = {block: k for k, block in enumerate(begun, start=1)}
    block_of = {name: blocks[entry] for name, entry in entries.items() if entry in blocks}

    def depth(name: str) -> int:
        if name in block_of:
            return place[block_of[name]]
        at = outside.get(name, top)
        return top if in_head(model, name) or at == len(begun) else at

    return Layers(tuple(begun), block_of, {name: depth(name) for name in names})


def parameters_in_order(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> list[str]:
    """Names of the parameters that one forward uses, in the order of their first use; nothing drops meanwhile.

    Raises:
        SiteError: as for `find_layers`.
    """
    uses = ParameterUses(model)
    _run_still(model, inputs, uses)
    return list(uses.used)


def outputs_of(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> list[Tensor]:
    """The tensors that one forward gives out; nothing drops meanwhile.

    Raises:
        SiteError: as for `find_layers`.
    """
    outputs: list[Tensor] = []
    hook = model.register_forward_hook(lambda *args: outputs.extend(tensors_in(args[-1:])))
    try:
        _run_still(model, inputs)
    finally:
        hook.remove()
    return outputs


def _run_still(model: nn.Module, inputs: Mapping[str, Any] | None, *contexts: AbstractContextManager[Any]) -> None:
    still = (turned(knob, 0.0) for knob in find_knobs(model).values())  # layer drop too
    run_once(model, inputs, *still, *contexts)


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


def _blocks_of(model: nn.Module, used: Sequence[str]) -> dict[str, str]:
    """Entry of a list → its layer, of entries in the order of their first use.

    Lists of one length in one module whose entries are used in turn, those of one number one after another, are one
    stack. Lists of one entry each show no turns, and are layers of their own.
    """
    lists: dict[str, list[str]] = {}  # path of each list → its entries' numbers, as they are used
    for entry in used:
        path, _, number = entry.rpartition(".")
        lists.setdefault(path, []).append(number)
    stacks: list[list[str]] = []
    for path in lists:
        beside = (stack for stack in stacks if _in_turn(model, stack[0], path, used))
        if (stack := next(beside, None)) is not None:
            stack.append(path)
        else:
            stacks.append([path])
    blocks: dict[str, str] = {}
    for stack in stacks:
        parent = stack[0].rpartition(".")[0]
        names = ",".join(path.rpartition(".")[2] for path in stack)
        both = f"{parent}.{{{names}}}".lstrip(".") if len(stack) > 1 else stack[0]
        blocks |= {f"{path}.{number}": f"{both}.{number}" for path in stack for number in lists[path]}
    return blocks


def _in_turn(model: nn.Module, first: str, second: str, used: Sequence[str]) -> bool:
    """Whether two lists are parallel: the first layer is in both, then the second."""
    one, other = (len(list(model.get_submodule(path).children())) for path in (first, second))
    if first.rpartition(".")[0] != second.rpartition(".")[0] or one != other:
        return False
    numbers = [n for path, _, n in (entry.rpartition(".") for entry in used) if path in (first, second)]
    layers = [number for number, _ in itertools.groupby(numbers)]
    return 1 < len(layers) == len(set(layers)) < len(numbers)
