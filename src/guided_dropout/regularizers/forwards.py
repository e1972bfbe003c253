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
    forward: Callable[..., Any] = module.forward
    own = "forward" in vars(module)
    on = True

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not (on and module.training):
            return forward(*args, **kwargs)
        with around():
            return forward(*args, **kwargs)

    def unwrap() -> None:
        nonlocal on
        on = False
        if module.forward is not wrapped:  # another one lies on top: this one only steps aside
            return
        if own:
            module.forward = forward
        else:
            del module.forward

    handle.on_remove(unwrap)
    module.forward = wrapped
