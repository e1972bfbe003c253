"""Seeing each operation that takes a parameter, whatever module it stands in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from guided_dropout.fisher.rules import RULES, Call, Rule

# A parameter's n-th operation in a forward: the same operation in each batch.
Key = tuple[str, int]


class ParameterOperations(TorchFunctionMode):
    """Calls `visit` for each operation that takes a parameter and has a rule; collects the names of the others.

    Attributes:
        uncovered: parameters that took part in an operation without a rule.
    """

    def __init__(self, names: Mapping[int, str], visit: Callable[[Rule, Call, dict[str, Key]], Tensor | None]):
        super().__init__()
        self.uncovered: set[str] = set()
        self._names = dict(names)
        self._visit = visit
        self._seen: Counter[str] = Counter()
        self._derived: list[Tensor] = []  # kept alive, so that no id is used twice

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for a in (*args, *kwargs.values()) for t in (a if isinstance(a, (list, tuple)) else (a,))]
        names = {self._names[id(t)] for t in tensors if id(t) in self._names}
        if not names:
            return func(*args, **kwargs)
        rule = RULES.get(func)
        call = rule.bind(*args, **kwargs) if rule else None
        if rule and call and id(call.x) not in self._names:
            roles = {r: self._names[id(p)] for r, p in call.parameters.items() if id(p) in self._names}
            if set(roles.values()) == names:
                out = self._visit(rule, call, {r: (n, self._seen[n]) for r, n in roles.items()})
                self._seen.update(names)
                if out is not None:
                    return out
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and any(out is t for t in tensors):
            return out  # a conversion that had nothing to convert
        if isinstance(out, Tensor) and _same_derivative(func, args, out):
            self._names[id(out)] = next(iter(names))
            self._derived.append(out)
        elif isinstance(out, Tensor) or (isinstance(out, (list, tuple)) and any(isinstance(t, Tensor) for t in out)):
            self.uncovered |= names
        return out


def _same_derivative(func: Any, args: Sequence[Any], out: Tensor) -> bool:
    """Whether `out` is a vector parameter plus a constant, or in another precision (Gemma's ``1 + weight.float()``)."""
    if out.dim() != 1 or not out.is_floating_point():
        return False
    if func in (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__):
        return any(isinstance(a, (int, float)) for a in args)
    return func in (Tensor.float, Tensor.double, Tensor.to, Tensor.type_as)
