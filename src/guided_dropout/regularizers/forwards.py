"""Running a module's forward differently in training mode, and hooks on it, so that compiled code notices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from guided_dropout.regularizers.base import Handle


def wrap_forward(handle: Handle, module: nn.Module, around: Callable[[], AbstractContextManager[Any]]) -> None:
    """Let the module's forward run inside of ``around()`` in training mode, until the handle is removed.

    It is meant for the modules that do the work, not for the model, so that a forward that gradient checkpointing runs
    again is treated alike. A forward, not a pair of hooks: `torch.compile` does not notice hooks that come later.
    """
    wrapped = _Wrapped(module, around)
    handle.on_remove(wrapped.off)
    module.forward = wrapped


def hook_noticed(handle: Handle, module: nn.Module, *hooks: RemovableHandle) -> None:
    """Take these hooks on a module off with the handle; until then, and from then on, `torch.compile` sees what is so.

    Compiled code is kept by what it was compiled for, and is shared by models of one class. Hooks are no part of that,
    but a module's own forward is: with one, nothing fits that was compiled without the hooks.
    """
    for hook in hooks:
        handle.on_remove(hook.remove)
    wrap_forward(handle, module, nullcontext)


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
        # Where another one lies on top, this one only steps aside, and goes with it.
        while isinstance(top := self._module.forward, _Wrapped) and not top._on:
            if top._own:
                self._module.forward = top._forward
            else:
                del self._module.forward
