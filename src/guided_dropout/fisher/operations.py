"""Seeing each operation that takes a parameter, whatever module it stands in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from guided_dropout.fisher.rules import RULES, Call, Rule

# The parameters behind an operation, what it is called, and its number among those of a forward.
Key = tuple[tuple[str, ...], str, int]

_ADD = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
_CAST = (Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.to, Tensor.type_as, Tensor.type)


@dataclass(frozen=True)
class View:
    """Elements of a parameter in memory: what `Tensor.as_strided` takes, the offset counted from its first element."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, t: Tensor, base: Tensor) -> View:
        """The place of `t` in `base`, whose memory it shares."""
        return cls(tuple(t.shape), t.stride(), int(t.storage_offset() - base.storage_offset()))

    def upright(self) -> View:
        """Itself, or the same matrix transposed, whichever has its rows further apart."""
        if len(self.size) != 2 or self.stride[0] >= self.stride[1]:
            return self
        return View(self.size[::-1], self.stride[::-1], self.offset)

    def is_contiguous(self) -> bool:
        """Whether its elements lie side by side in their order."""
        expected = 1
        for n, s in zip(reversed(self.size), reversed(self.stride), strict=True):
            if n > 1 and s != expected:
                return False
            expected *= n
        return True

    def end(self) -> int:
        """One past its last element."""
        return self.offset + 1 + sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True))

    def within(self, t: Tensor) -> Tensor:
        """The same elements of `t`, a tensor that lies in memory as the parameter does."""
        return t.as_strided(self.size, self.stride, t.storage_offset() + self.offset)


@dataclass(frozen=True, eq=False)
class Origin:
    """A tensor made of parameters alone.

    Attributes:
        names: the parameters that it is made of.
        tensor: what the model sees; held here, so that no id is used twice.
        graph: the same values as a function of the parameters' leaves.
        view: which elements of its only parameter have the same derivative; None for any other function.
    """

    names: tuple[str, ...]
    tensor: Tensor
    graph: Tensor
    view: View | None


@dataclass(frozen=True)
class Operation:
    """An operation on samples and on tensors made of parameters.

    Attributes:
        key: which it is.
        function: what was called, with `args` and `kwargs`.
        origins: what its tensors are made of; no entry for the samples' own.
        rule: and `call`: how it is differentiated per sample; None where no rule covers it.
    """

    key: Key
    function: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    origins: Mapping[int, Origin]
    rule: Rule | None
    call: Call | None

    @property
    def name(self) -> str:
        """What people call the operation."""
        return _name(self.function)

    def run(self) -> Any:
        """Run it as the model asked for it."""
        return self.function(*self.args, **self.kwargs)

    def tensors(self) -> list[Tensor]:
        """Its tensors, in the order of its arguments."""
        return tensors_of((self.args, self.kwargs))

    def origin_of(self, t: Tensor) -> Origin | None:
        """What `t` is made of, if that is parameters alone."""
        return self.origins.get(id(t))


class Visitor(Protocol):
    """Who decides on the operations that `ParameterOperations` meets."""

    def is_constant(self, operation: Operation) -> bool:
        """Whether nothing in the operation depends on the samples."""
        ...

    def visit(self, operation: Operation) -> Any:
        """Run the operation."""
        ...

    def other(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """See an operation without parameters, after the fact."""
        ...


class ParameterOperations(TorchFunctionMode):
    """Shows a visitor each operation on samples and parameters.

    What the model makes of parameters alone (a view, a cast, the exponential of one, a layer norm of a table) is
    followed, so that an operation on it counts as one on the parameters.
    """

    def __init__(self, parameters: Mapping[str, Tensor], visitor: Visitor):
        super().__init__()
        self._visitor = visitor
        self._seen: Counter[tuple[tuple[str, ...], str]] = Counter()
        self.leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
        self._parameters = parameters
        self._origins = {id(p): Origin((name,), p, self.leaves[name], _whole(p)) for name, p in parameters.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = tensors_of((args, kwargs))
        origins = {id(t): self._origins[id(t)] for t in tensors if id(t) in self._origins}
        if not origins:
            out = func(*args, **kwargs)
            self._visitor.other(func, args, kwargs, out)
            return out
        names = tuple(dict.fromkeys(n for o in origins.values() for n in o.names))
        rule, call = _bound(func, args, kwargs, origins)
        kind = (names, _name(func))
        operation = Operation((*kind, self._seen[kind]), func, args, kwargs, origins, rule, call)
        if self._visitor.is_constant(operation):
            out = self._derive(operation)
            self._visitor.other(func, args, kwargs, out)
        elif rule is None and (viewed := self._view(operation)) is not None:
            return viewed
        else:
            out = self._visitor.visit(operation)
        if tensors_of(out):
            self._seen[kind] += 1
        return out

    def _derive(self, operation: Operation) -> Any:
        """Run an operation on parameters alone, and remember what its results are made of."""
        graphs = {i: o.graph for i, o in operation.origins.items()}
        given = {id(o.graph): o.tensor for o in operation.origins.values()}
        args, kwargs = replaced((operation.args, operation.kwargs), lambda t: graphs.get(id(t), t))
        out = operation.function(*args, **kwargs)
        if not tensors_of(out):
            return operation.run()  # a question about the parameter itself

        def made(t: Tensor) -> Tensor:
            if id(t) in given:
                return given[id(t)]  # a conversion that had nothing to convert
            return self._made_of(operation, t) if t.requires_grad else t

        return replaced(out, made)

    def _view(self, operation: Operation) -> Any:
        """The result of an operation that only picks elements of a parameter, by whatever index; None for others."""
        if len(operation.origins) > 1 or next(iter(operation.origins.values())).view is None:
            return None
        if operation.function not in _PICKING:
            return None
        out = operation.run()
        (origin,) = operation.origins.values()
        if not isinstance(out, Tensor) or not _shares_memory(out, origin.tensor):
            return None
        return self._derive(operation)

    def _made_of(self, operation: Operation, graph: Tensor) -> Tensor:
        tensor = graph.detach()
        names = operation.key[0]
        view = None
        first = next(iter(operation.origins.values()))
        if len(operation.origins) == 1 and first.view is not None:
            if _shares_memory(tensor, base := self._parameters[names[0]]):
                view = View.of(tensor, base)
                if any(s == 0 < n - 1 for n, s in zip(view.size, view.stride, strict=True)):
                    view = None  # elements that stand there several times
            elif tensor.shape == first.tensor.shape and _same_derivative(operation):
                view = first.view
        self._origins[id(tensor)] = Origin(names, tensor, graph, view)
        return tensor


_PICKING = (Tensor.__getitem__, Tensor.select, torch.select)


def _bound(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], origins: Mapping[int, Origin]
) -> tuple[Rule | None, Call | None]:
    rule = RULES.get(func)
    if rule is None:
        return None, None
    first = next(t for t in args if isinstance(t, Tensor)) if any(isinstance(t, Tensor) for t in args) else None
    bind = rule.mirrored if rule.mirrored and id(first) in origins else rule.bind
    call = bind(*args, **kwargs)
    if call is None or id(call.x) in origins or not {id(t) for t in call.parameters.values()} >= set(origins):
        return None, None
    return rule, call


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", str(function))


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors in nested sequences and mappings."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, Mapping):
        tree = tree.values()
    elif not isinstance(tree, (list, tuple)):
        return []
    return [t for part in tree for t in tensors_of(part)]


def replaced(tree: Any, new: Callable[[Tensor], Any]) -> Any:
    """The same nested sequences and mappings with other tensors."""
    if isinstance(tree, Tensor):
        return new(tree)
    if isinstance(tree, Mapping):
        return {k: replaced(v, new) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        parts = [replaced(part, new) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return tree


def _whole(p: Tensor) -> View | None:
    """All elements of a parameter; None where sums of its shape would not lie in memory as it does, which has gaps."""
    return View.of(p, p) if torch.empty_like(p, device="meta").stride() == p.stride() else None


def _shares_memory(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _same_derivative(operation: Operation) -> bool:
    """Whether the result is the parameter plus a constant, or in another precision (Gemma's ``1 + weight.float()``)."""
    if operation.function in _ADD:
        return any(isinstance(a, (int, float)) for a in operation.args)
    return operation.function in _CAST
