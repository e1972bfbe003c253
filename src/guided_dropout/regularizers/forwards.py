"""Running a module's forward differently in training mode."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from guided_dropout.regularizers.base import Handle


def wrap_forward(handle: Handle, module: nn.Module, around: Callable[[], AbstractContextManager[Any]]) -> None:
    """Let the module's forward run inside of ``around()`` in training mode, until the handle is removed.

    It is meant for the modules that do the work, not for the model, so that a forward that gradient checkpointing runs
    again is treated alike. A forward, not a pair of hooks: `torch.compile` does not notice hooks that come later.
    """
    wrapped = _Wrapped(module, around)
    handle.on_remove(wrapped.off)
    module.forward = wrapped


class _Wrapped:
    """A module's forward. An object, not a function: copied with its module, it belongs to the copy."""

    def __init__(self, module: nn.Module, around: Callable[[], AbstractContextManager[Any]]):
        self._module, self._around = module, around
        self._forward: Callable[..., Any] = module.forward
        self._own, self._on = "forward" in vars(module), True
        functools.update_wrapper(self, self._forward, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (self._on and self._module.training):
            return self._forward(*args, **kwargs)
        with self._around():
            return self._forward(*args, **kwargs)

    def off(self) -> None:
        """Take it off the module."""
        self._on = False
        if self._module.forward is not self:  # another one lies on top: this one only steps aside
            return
        if self._own:
            self._module.forward = self._forward
        else:
            del self._module.forward
