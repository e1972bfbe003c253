"""Activations that a model writes out step by step, run as torch's own, in one.

GPT-2's GELU takes eight operations; the backward keeps what five of them made.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from guided_dropout.undisturbed import replaced

_OWN: tuple[Callable[[Tensor], Tensor], ...] = (partial(F.gelu, approximate="tanh"), F.gelu, F.silu)


def written_out(model: nn.Module) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
    """Modules that compute GELU (its tanh form too) or SiLU in several operations → torch's own.

    Found by running each module that has no parameters, buffers or parts: values and slopes in float64 are to 1e-9
    those of torch's, at infinity too. In half precision, where each operation rounds, there are none.
    """
    if not all(p.dtype in (torch.float32, torch.float64) for p in model.parameters() if p.is_floating_point()):
        return {}
    alone = (
        m
        for m in model.modules()
        if not any(True for _ in (*m.children(), *m.parameters(recurse=False), *m.buffers(recurse=False)))
    )
    return {module: own for module in alone if (own := _own(module))}


@contextlib.contextmanager
def in_one_step(found: Mapping[nn.Module, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Within, the modules that `written_out` has found run torch's own."""
    with contextlib.ExitStack() as stack:
        for module, own in found.items():
            stack.enter_context(replaced(module, "forward", own))
        yield


class _Count(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return func(*args, **(kwargs or {}))


def _own(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Torch's own that does what the module does in several operations; None where there is none."""
    if "forward" in vars(module) or len(inspect.signature(module.forward).parameters) != 1:
        return None
    count = _Count()

    def counted(x: Tensor) -> Any:
        with count:
            return module.forward(x)

    try:
        with torch.random.fork_rng(devices=[]):
            found = _values(counted)
    except Exception:  # whatever a module says to what it was not made for
        return None
    if found is None or count.operations < 2:
        return None
    return next((own for own in _OWN if _are_alike(found, _values(own))), None)


def _values(function: Callable[[Tensor], Any]) -> tuple[Tensor, Tensor] | None:
    """Values and slopes; None where it does not make one number of each."""
    steps = torch.linspace(-13, 13, 521, dtype=torch.float64, device="cpu")
    far = steps.new_tensor([-1e30, -50, 50, 1e30, -torch.inf, torch.inf, torch.nan])
    x = torch.cat([steps, far]).requires_grad_()
    y = function(x)
    if y.shape != x.shape or not y.requires_grad:
        return None
    (slopes,) = torch.autograd.grad(y.sum(), x)
    return y.detach(), slopes


def _are_alike(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor] | None) -> bool:
    return b is not None and all(
        torch.allclose(s, t, rtol=1e-9, atol=1e-9, equal_nan=True) for s, t in zip(a, b, strict=True)
    )
