"""Running a module's forward differently in training mode, and hooks on it, so that compiled code notices."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import MethodType
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from guided_dropout.regularizers.base import Handle

_REPLICATE = "_replicate_for_data_parallel"  # what nn.DataParallel calls on each module


def wrap_forward(handle: Handle, module: nn.Module, around: Callable[[nn.Module], AbstractContextManager[Any]]) -> None:
    """Let the module's forward run inside of ``around(module)`` in training mode, until the handle is removed.

    It is meant for the modules that do the work, not for the model, so that a forward that gradient checkpointing runs
    again is treated alike. A forward, not a pair of hooks: `torch.compile` does not notice hooks that come later. In a
    replica by ``nn.DataParallel`` `around` gets the replica.
    """
    wrapped = _Wrapped(module, around)
    handle.on_remove(wrapped.off)
    module.forward = wrapped
    setattr(module, _REPLICATE, wrapped.replica)


def hook_noticed(handle: Handle, module: nn.Module, *hooks: RemovableHandle) -> None:
    """Take these hooks on a module off with the handle; until then, and from then on, `torch.compile` sees what is so.

    Compiled code is kept by what it was compiled for, and is shared by models of one class. Hooks are no part of that,
    but a module's own forward is: with one, nothing fits that was compiled without the hooks.
    """
    for hook in hooks:
        handle.on_remove(hook.remove)
    wrap_forward(handle, module, nullcontext)


def is_replica(module: nn.Module) -> bool:
    """Whether ``nn.DataParallel`` made it, for one forward, of a module that goes on without it."""
    return getattr(module, "_is_replica", False)


class _Wrapped:
    """A module's forward. An object, not a function: copied with its module, it belongs to the copy."""

    def __init__(self, module: nn.Module, around: Callable[[nn.Module], AbstractContextManager[Any]]):
        self._module, self._around = module, around
        self._forward: Callable[..., Any] = module.forward
        self._own, self._on = "forward" in vars(module), True
        functools.update_wrapper(self, self._forward, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (self._on and self._module.training):
            return self._forward(*args, **kwargs)
        with self._around(self._module):
            return self._forward(*args, **kwargs)

    @property
    def __func__(self) -> Callable[..., Any]:
        """As a method has one: accelerate wraps that, and binds it to the module when it unwraps a model."""
        return lambda _, *args, **kwargs: self(*args, **kwargs)

    def replica(self) -> nn.Module:
        """A replica of the module, whose forward is its own: the module's would use the module's weights."""
        made = getattr(type(self._module), _REPLICATE)(self._module)
        if vars(made)["forward"] is self:
            made.forward = self._of(made)
        return made

    def _of(self, replica: nn.Module) -> _Wrapped:
        other = copy.copy(self)
        other._module = replica
        if isinstance(self._forward, _Wrapped):
            other._forward = self._forward._of(replica)
        elif isinstance(self._forward, MethodType) and self._forward.__self__ is self._module:
            other._forward = MethodType(self._forward.__func__, replica)
        return other

    def off(self) -> None:
        """Take it off the module."""
        self._on = False
        # Where another one lies on top, this one only steps aside, and goes with it.
        while isinstance(top := self._module.forward, _Wrapped) and not top._on:
            if top._own:
                self._module.forward = top._forward
            else:
                del self._module.forward
        if isinstance(top, _Wrapped):
            setattr(self._module, _REPLICATE, top.replica)
        else:
            vars(self._module).pop(_REPLICATE, None)
