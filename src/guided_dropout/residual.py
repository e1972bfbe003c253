"""Where a model's blocks write to the residual stream, found by running it, and the hook that can drop there.

A *write* is an addition in a block's forward: one operand is the block's input, or that plus earlier writes, normalised
or not; the other was made by a part of the block. Of a sum of two parts, as in parallel blocks, each is a write.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from guided_dropout.adapters import is_adapter
from guided_dropout.knobs import AbsentKnob, find_knobs
from guided_dropout.probe import DROPOUTS, QUIET, run_once, tensors_in, turned

ATTRIBUTE = "residual_dropout"
_ADDS = {"add", "__add__", "__radd__", "add_", "__iadd__"}
# What leaves a part's output what it was, but for its shape, precision or scale.
_SAME = {
    *("to", "float", "half", "bfloat16", "type", "type_as", "clone", "contiguous", "view", "reshape", "view_as"),
    *("squeeze", "unsqueeze", "mul", "__mul__", "__rmul__", "div", "__truediv__"),
}


@dataclass(frozen=True)
class ResidualWrite:
    """A module whose output is written to the residual stream, and not dropped on the way.

    Attributes:
        module: the module.
        index: which of its outputs; None where it returns a tensor.
        owners: the block's parts that make it: attention, or a feed-forward network, and a norm after it.
    """

    module: nn.Module
    index: int | None
    owners: tuple[nn.Module, ...]


class ResidualDropout:
    """A forward hook: dropout on what a module writes to the residual stream, at the rate that stands on the module."""

    def __init__(self, write: ResidualWrite):
        self._index = write.index
        self.owners = write.owners

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The module's output, dropped in training mode."""
        rate: Any = getattr(module, ATTRIBUTE)
        if not module.training or rate == 0:
            return output
        if self._index is None:
            return F.dropout(output, rate, True)
        dropped = F.dropout(output[self._index], rate, True)
        return type(output)(dropped if i == self._index else part for i, part in enumerate(output))


def residual_owners(module: nn.Module) -> tuple[nn.Module, ...] | None:
    """The parts that feed the residual dropout on a module; None where there is no such dropout."""
    hooks = (hook for hook in module._forward_hooks.values() if isinstance(hook, ResidualDropout))
    return next((hook.owners for hook in hooks), None)


def find_residual_writes(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> list[ResidualWrite]:
    """What the model's blocks write to the residual stream without dropout, in the order of the first write.

    Args:
        model: any model; it is run once and left as it was.
        inputs: keyword arguments of its forward; by default a tiny batch.

    Raises:
        SiteError: the model does not run on the tiny batch.
    """
    watch = _Watch()
    # A dropout that was left out is a site already, so it should be seen.
    absent = (turned(knob, QUIET) for knob in find_knobs(model).values() if isinstance(knob, AbsentKnob))
    run_once(model, inputs, *absent, watch.calls_of(model), watch)
    return list(watch.writes.values())


@dataclass(eq=False)
class _Call:
    """One run of a module's forward."""

    module: nn.Module
    parent: _Call | None
    inputs: list[Tensor]
    in_adapter: bool
    stream: set[int] = field(default_factory=set)

    def child_of(self, ancestor: _Call) -> _Call | None:
        """The call directly below `ancestor` in which this one happened."""
        call: _Call | None = self
        while call is not None and call.parent is not ancestor:
            call = call.parent
        return call


class _Watch(TorchFunctionMode):
    """Follows tensors from the module that made them to the addition; keeps all of them, so that ids stay unique."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: dict[int, ResidualWrite] = {}
        self._kept: list[Any] = []
        self._call: _Call | None = None
        self._made: dict[int, tuple[_Call, int | None]] = {}
        self._same: dict[int, int] = {}
        self._sums: dict[int, tuple[int, int]] = {}
        self._dropped: set[int] = set()

    @contextlib.contextmanager
    def calls_of(self, model: nn.Module) -> Iterator[None]:
        """Note the calls of the model's modules."""
        with contextlib.ExitStack() as stack:
            for module in model.modules():
                stack.callback(module.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(self._end).remove)
            yield

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        inputs = [t for t in tensors_in([args, kwargs]) if t.is_floating_point()]
        self._kept.append(inputs)
        in_adapter = is_adapter(module) or (self._call is not None and self._call.in_adapter)
        self._call = _Call(module, self._call, inputs, in_adapter, {id(t) for t in inputs})

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        call = self._call
        assert call is not None
        self._call = call.parent
        parts = [(None, output)] if isinstance(output, Tensor) else []
        if isinstance(output, tuple | list):
            parts = [(i, part) for i, part in enumerate(output) if isinstance(part, Tensor)]
        # A norm between two writes, or before the first, makes no other stream.
        around = call.parent if call.inputs and not _projects(module) else None
        goes_on = around is not None and self._is_stream(id(call.inputs[0]), around)
        for index, part in parts:
            self._kept.append(part)
            if is_adapter(module):  # also where its layer made it, as after an adapter of what goes in
                self._made[id(part)] = call, index
            self._made.setdefault(id(part), (call, index))
            if around is not None and goes_on and part.shape == call.inputs[0].shape:
                around.stream.add(id(part))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, Tensor) or not result.is_floating_point():
            return result
        self._kept.append(result)
        operands = [t for t in (*args, *(kwargs or {}).values()) if isinstance(t, Tensor)]
        name = getattr(func, "__name__", "")
        if func in DROPOUTS:
            self._dropped.add(id(result))
        elif name in _ADDS and len(operands) == 2 and operands[0].shape == operands[1].shape:
            left = self._as_it_was(result) if result is operands[0] else id(operands[0])
            self._add(left, id(operands[1]), id(result))
        elif name in _SAME and operands and result is not operands[0]:
            large = [t for t in operands if t.numel() > 1]
            if len(large) == 1 and large[0].numel() == result.numel():
                self._same[id(result)] = id(large[0])
        return result

    def _as_it_was(self, changed: Tensor) -> int:
        """A key for what stood in a tensor before an addition in place: the sum is made by what returns it next."""
        self._kept.append(before := object())
        for table in (self._made, self._same, self._sums):
            _rename(table, id(changed), id(before))
        if id(changed) in self._dropped:
            self._dropped.remove(id(changed))
            self._dropped.add(id(before))
        if self._call is not None and id(changed) in self._call.stream:
            self._call.stream.add(id(before))
        return id(before)

    def _add(self, left: int, right: int, result: int) -> None:
        call = self._call
        if call is None or call.in_adapter:  # what an adapter adds up is no stream
            return
        in_stream = [self._is_stream(key, call) for key in (left, right)]
        if in_stream == [False, False]:
            self._sums[result] = left, right
        elif sum(in_stream) == 1:
            for write in self._parts_of(right if in_stream[0] else left, call):
                self.writes.setdefault(id(write.module), write)
            call.stream.add(result)

    def _is_stream(self, key: int, call: _Call) -> bool:
        while key not in call.stream and key in self._same:
            key = self._same[key]
        return key in call.stream

    def _parts_of(self, key: int, block: _Call) -> Iterator[ResidualWrite]:
        """What of `key` a part of the block made and nothing dropped."""
        if key in self._dropped:
            return
        if key in self._made:
            call, index = self._made[key]
            owners = self._owners(call, block)
            if owners and _projects(owners[-1]):
                yield ResidualWrite(call.module, index, tuple(owners))
        elif key in self._sums:
            for part in self._sums[key]:
                yield from self._parts_of(part, block)
        elif key in self._same:
            yield from self._parts_of(self._same[key], block)

    def _owners(self, call: _Call, block: _Call) -> list[nn.Module]:
        """The parts of the block from the one that made a write back to the first that projects."""
        owners: list[nn.Module] = []
        part = call.child_of(block)
        while part is not None and part.module not in owners:
            owners.append(part.module)
            if _projects(part.module) or not part.inputs or id(part.inputs[0]) not in self._made:
                break
            part = self._made[id(part.inputs[0])][0].child_of(block)
        return owners


def _rename(table: dict[int, Any], old: int, new: int) -> None:
    if old in table:
        table[new] = table.pop(old)


def _projects(module: nn.Module) -> bool:
    """Whether there is a matrix in it that is no table of embeddings."""
    return any(
        p.dim() > 1 for m in module.modules() if not isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)
    )
