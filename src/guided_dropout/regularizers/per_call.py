"""A rate for each of several dropout calls that share one knob, set while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from guided_dropout.errors import SiteError
from guided_dropout.knobs import Knob
from guided_dropout.regularizers.base import Handle
from guided_dropout.regularizers.forwards import hook_noticed, is_replica


def set_by_call(
    handle: Handle,
    model: nn.Module,
    rates: Mapping[Knob, Sequence[float]],
    holders: Mapping[str, nn.Module],
    rules: Callable[[Knob], bool],
) -> None:
    """Turn each knob to its next rate whenever its holder's forward begins, from the first in each of the model's.

    Args:
        handle: what ends this when it is removed.
        model: the model whose forward begins the count.
        rates: knob → the rates of its calls in one forward of the model, in order.
        holders: path of the knob → the module that has one forward for each of these calls.
        rules: whether these are the rates that a knob should have now; another schedule may lie on top.

    Raises:
        SiteError: gradient checkpointing is on.
    """
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise SiteError(
            "a rate for each call does not hold under gradient checkpointing, which runs calls again out of order; "
            "expected it off: turn it off, or make the schedule without per_call"
        )
    for knob, calls in rates.items():
        count, holder = _Count(knob, calls, rules), holders[knob.path]
        whole = model.register_forward_pre_hook(count.begin), model.register_forward_hook(count.end)
        hook_noticed(handle, model, *whole)
        hook_noticed(handle, holder, holder.register_forward_pre_hook(count.next))


class _Count:
    """How many forwards of a knob's holder this forward of the model has seen."""

    def __init__(self, knob: Knob, rates: Sequence[float], rules: Callable[[Knob], bool]):
        self._knob = knob
        self._rates = tuple(rates)
        self._rules = rules
        self._done = 0

    def begin(self, *_: Any) -> None:
        """The model's forward begins."""
        self._done = 0

    def next(self, module: nn.Module, *_: Any) -> None:
        """The holder's forward begins."""
        if not module.training:
            return
        if torch.compiler.is_compiling():  # first of all: what is compiled while another schedule rules would stay
            raise SiteError(
                f"a rate for each call of {self._knob.path} does not hold under torch.compile, which fixes the order; "
                "expected a model that is not compiled: make the schedule without per_call"
            )
        if not self._rules(self._knob):
            return
        if is_replica(module):
            raise SiteError(
                f"a rate for each call of {self._knob.path} does not hold under nn.DataParallel, whose replicas run "
                "side by side; expected one process for each device: use torchrun or accelerate, or make the schedule "
                "without per_call"
            )
        if self._knob.rate not in self._rates:  # somebody else, a probe say, has turned it
            return
        if self._done == len(self._rates):
            self._refuse("more")
        self._knob.turn(self._rates[self._done])
        self._done += 1

    def end(self, *_: Any) -> None:
        """The model's forward has ended."""
        if self._done and self._done != len(self._rates):
            self._refuse(f"{self._done}")
        if self._done:
            self._knob.turn(self._rates[0])

    def _refuse(self, number: str) -> None:
        raise SiteError(
            f"{self._knob.path} was called {number} times in a forward, expected {len(self._rates)}, for each of which "
            "there is a rate: turn gradient checkpointing and layer drop off, or make the schedule without per_call"
        )
