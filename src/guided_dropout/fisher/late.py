"""A head that is left out of its model's forward, and run afterwards on the targets of a few samples at a time.

The logits of a large batch, with large vocabularies the peak of memory, then never exist. No square may be added
before it is known that all losses of the batch are finite; so a head is run in parts only where it is a linear layer,
and where a bound on its logits says beforehand that they are.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from guided_dropout.fisher.shortcuts import IndirectError
from guided_dropout.undisturbed import replaced

# Targets at a time. For each group the head's weights and sums are read once, which with fewer takes too much of the
# time.
_AT_ONCE = {"cpu": 384}
_AT_ONCE_ELSEWHERE = 2048
# The losses of a sample with as many targets as any has add up to what float32 holds.
_SAFE = 1e30


@dataclass(frozen=True)
class LateHead:
    """A linear layer whose output a model gives out as its logits.

    Attributes:
        module: the layer.
        weight: its largest weight, without the sign.
        bias: its largest bias.
    """

    module: nn.Linear
    weight: float
    bias: float

    @classmethod
    def of(cls, head: nn.Module | None) -> LateHead | None:
        """The head, if it is a linear layer and nothing hooks into it; whether its output is the logits is not seen."""
        if type(head) is not nn.Linear or ("forward" in vars(head) and not _only_moves_its_input(head)):
            return None
        if any((head._forward_pre_hooks, head._forward_hooks, head._backward_pre_hooks, head._backward_hooks)):
            return None
        return cls(head, _largest(head.weight), 0.0 if head.bias is None else _largest(head.bias))

    def is_finite(self, rows: Tensor) -> bool:
        r"""Whether the losses at `rows` [M, d] are certainly finite.

        No logit is beyond :math:`\max|W|\,\lVert h\rVert_1 + \max|b|`.
        """
        wide = torch.promote_types(rows.dtype, torch.float32)
        bound = self.weight * torch.linalg.vector_norm(rows.detach(), 1, dim=1, dtype=wide).max().item() + self.bias
        return bound < min(torch.finfo(rows.dtype).max / 4, _SAFE)  # not where it is NaN

    def groups(self, offsets: Sequence[int], at_once: int | None = None) -> list[slice]:
        """Samples in groups of about equally many targets: less than a sample's more than `at_once`.

        Args:
            offsets: B+1 numbers; sample b has the targets ``offsets[b]`` to ``offsets[b+1]``.
            at_once: None: what suits the device.
        """
        if at_once is None:
            at_once = _AT_ONCE.get(self.module.weight.device.type, _AT_ONCE_ELSEWHERE)
        total = offsets[-1]
        parts = -(-total // at_once)
        groups, first, part = [], 0, 0
        for sample, (start, end) in enumerate(itertools.pairwise(offsets)):
            if start == end:
                continue
            own = (start + end) * parts // (2 * total)  # where its middle lies
            if own != part and start > offsets[first]:
                groups.append(slice(first, sample))
                first = sample
            part = own
        return [*groups, slice(first, len(offsets) - 1)]


def _only_moves_its_input(head: nn.Module) -> bool:
    """Whether its forward is the one that accelerate puts around a layer's own where a model is on several devices."""
    from accelerate.hooks import AlignDevicesHook

    hook, forward, old = (vars(head).get(name) for name in ("_hf_hook", "forward", "_old_forward"))
    return (
        type(hook) is AlignDevicesHook
        and not (hook.offload or hook.io_same_device or hook.no_grad)
        and getattr(getattr(forward, "func", None), "__module__", None) == AlignDevicesHook.__module__
        and getattr(old, "__func__", None) is nn.Linear.forward
    )


def _largest(t: Tensor) -> float:
    low, high = t.detach().aminmax()
    return max(-low.item(), high.item()) if low <= high else float("nan")


class LeftOut:
    """A forward in which a head is called with no rows.

    Args:
        at_targets: what it is called with → that at the targets, [M, d].
        entered: called with whether the head has been entered or left.
    """

    def __init__(self, at_targets: Callable[[Tensor], Tensor], entered: Callable[[bool], None]):
        self._at_targets, self._entered = at_targets, entered
        self._rows: Tensor | None = None
        self._out: tuple[Tensor, int] | None = None

    @contextlib.contextmanager
    def of(self, head: nn.Module, model: nn.Module) -> Iterator[None]:
        """Within, this is what happens to `head` of `model`."""
        handles = [head.register_forward_pre_hook(self._before), head.register_forward_hook(self._after)]
        hook = getattr(model, "_hf_hook", None)
        try:
            with contextlib.ExitStack() as stack:
                if getattr(hook, "io_same_device", False):  # it gives out a copy of the logits, on the input's device
                    stack.enter_context(replaced(hook, "io_same_device", False))
                yield
        finally:
            for h in handles:
                h.remove()

    def rows(self, logits: Tensor) -> Tensor:
        """What the head would have seen at the targets, [M, d].

        Raises:
            IndirectError: `logits`, which the model gave out, are not just what the head made.
        """
        if self._rows is None or self._out is None:
            raise IndirectError("the head was not called")
        out, version = self._out
        if logits is not out or logits._version != version:
            raise IndirectError("the logits are not the head's output")
        return self._rows

    def _before(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if self._rows is not None or len(args) != 1:
            raise IndirectError("the head was called twice, or with something else")
        self._entered(True)
        rows = self._rows = self._at_targets(args[0])
        return (rows.detach()[:0],)

    def _after(self, _: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        self._entered(False)
        self._out = out, out._version
