"""The end of a model, in which each position is by itself, run at the target positions only.

After its last attention a model treats each position by itself, so that what it computes at positions without a target
goes nowhere. Where that part begins is found by running. A residual stream that flows past that point is cut where it
meets what went through.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from guided_dropout.fisher.operations import replaced, tensors_of
from guided_dropout.fisher.shortcuts import UNSUITED, IndirectError


@dataclass(frozen=True)
class Start:
    """The call of a module from which on each position is by itself.

    Attributes:
        module: the module.
        call: which of its calls in a forward, from 0.
    """

    module: nn.Module
    call: int


class Narrowed:
    """A forward that goes on with the targets alone from some call of a module on.

    Hidden states [B, T, ...] become [1, M, ...] there: the M targets, sample after sample.

    Args:
        targets: [B, T] bool.

    Attributes:
        has_begun: whether that call has been reached, with hidden states to narrow.
    """

    def __init__(self, targets: Tensor):
        self.has_begun = False
        self._wide = tuple(targets.shape)
        self._rows = targets.flatten().nonzero()[:, 0]
        self._narrow = (1, len(self._rows))

    @contextlib.contextmanager
    def of(self, start: Start | None) -> Iterator[None]:
        """Within, this is what happens from `start` on.

        Raises:
            IndirectError: what followed did not take fewer positions.
        """
        if start is None:
            yield
            return
        calls = 0

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal calls
            calls += 1
            if calls - 1 != start.call or not any(map(self.is_wide, tensors_of((args, kwargs)))):
                return None
            self.has_begun = True
            meetings.enter_context(_Meetings(self))
            return self.narrow((args, kwargs))

        handle = start.module.register_forward_pre_hook(before, with_kwargs=True)
        try:
            with contextlib.ExitStack() as meetings:
                yield
        except torch.OutOfMemoryError:
            raise
        except UNSUITED as e:
            if self.has_begun:
                raise IndirectError(f"with fewer positions: {e}") from e
            raise
        finally:
            handle.remove()

    def narrow(self, tree: Any) -> Any:
        """Nested sequences and mappings, with the targets alone of each [B, T, ...]."""
        return replaced(tree, lambda t: self.at_targets(t)[None] if self.is_wide(t) else t)

    def has_all(self, t: Tensor) -> bool:
        """Whether it has the form of all positions."""
        return t.shape[:2] == self._wide

    def is_wide(self, t: Tensor) -> bool:
        """Whether it holds something of each position's; what needs no gradient is left as it is."""
        return t.dim() > 2 and self.has_all(t) and t.requires_grad

    def is_narrow(self, t: Tensor) -> bool:
        """Whether it holds something of each target's."""
        return self.has_begun and t.dim() > 2 and t.shape[:2] == self._narrow != self._wide

    def dim(self, t: Tensor) -> int | None:
        """The dimension of [1, M, ...] or [M, ...] along which the targets are; None of what holds anything else."""
        if not self.has_begun or t.shape[:2] == self._wide != self._narrow:
            return None
        if t.dim() > 2 and t.shape[:2] == self._narrow:
            return 1
        return 0 if t.shape[:1] == self._narrow[1:] else None

    def at_targets(self, t: Tensor) -> Tensor:
        """[B, T, d], or what is narrow already → [M, d]."""
        rows = self._rows.to(t.device)  # another layer's may be another
        with torch._C.DisableTorchFunction():  # what is picked here is nothing that the model picks
            return t[0] if self.is_narrow(t) else t.flatten(0, 1).index_select(0, rows)


class _Meetings(TorchFunctionMode):
    """Where what has all positions meets what has the targets alone, it is narrowed."""

    def __init__(self, narrowed: Narrowed):
        super().__init__()
        self._narrowed = narrowed

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = tensors_of((args, kwargs))
        if len(tensors) > 1 and any(map(self._narrowed.is_narrow, tensors)):
            args, kwargs = self._narrowed.narrow((args, kwargs))
        return func(*args, **kwargs)


@dataclass
class _Call:
    start: Start
    inputs: list[Tensor]
    weighs: bool = field(init=False)

    def __post_init__(self) -> None:
        self.weighs = any(p.dim() > 1 for p in self.start.module.parameters(recurse=False))


def starts(model: nn.Module, head: nn.Module, targets: Tensor, forward: Callable[[], Tensor]) -> list[Start]:
    """Calls of modules whose inputs at one position reach the logits of that position alone, in their order.

    Those after the last matrix but the head's are left out: from there on there is nothing to save.

    Args:
        model: the model; its parameters need a gradient.
        head: its head.
        targets: [B, T] bool.
        forward: gives the logits at the targets, [M, V].
    """
    calls: list[_Call] = []
    number: Counter[nn.Module] = Counter()

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = [t for t in tensors_of((args, kwargs)) if t.dim() > 2 and t.shape[:2] == targets.shape]
        calls.append(_Call(Start(module, number[module]), [t for t in inputs if t.requires_grad]))
        number[module] += 1

    handles = [m.register_forward_pre_hook(before, with_kwargs=True) for m in model.modules()]
    try:
        with torch.enable_grad():
            last = forward()[-1]  # which sees all that its sample has
    finally:
        for handle in handles:
            handle.remove()
    inputs = [t for call in calls for t in call.inputs]
    if not inputs:
        return []
    weights = torch.arange(len(last), dtype=last.dtype, device=last.device).cos()
    gradients = torch.autograd.grad(last @ weights, inputs, allow_unused=True)
    elsewhere = torch.ones_like(targets)
    elsewhere[tuple(targets.nonzero()[-1])] = False
    by_itself = {  # each on its layer's device
        id(t): not g[elsewhere.to(g.device)].any() for t, g in zip(inputs, gradients, strict=True) if g is not None
    }
    end = max((i for i, call in enumerate(calls) if call.weighs and call.start.module is not head), default=-1)
    return [
        call.start
        for call in calls[: end + 1]
        if any(id(t) in by_itself for t in call.inputs) and all(by_itself.get(id(t), True) for t in call.inputs)
    ]
