"""Residual dropout for models that are built without it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from guided_dropout.errors import SiteError
from guided_dropout.regularizers.base import Handle
from guided_dropout.regularizers.forwards import hook_noticed
from guided_dropout.residual import ATTRIBUTE, ResidualDropout, find_residual_writes, residual_owners
from guided_dropout.schedule.shapes import check_rate


class ResidualSitesHandle(Handle):
    """Takes added dropout sites off a model again, by `remove` or at the end of a ``with`` block.

    Attributes:
        sites: the paths of the sites, in the order of their first call.
    """

    again = "call add_residual_sites again"

    def __init__(self, sites: tuple[str, ...]):
        super().__init__({"sites": list(sites)})
        self.sites = sites


def add_residual_sites(
    model: nn.Module, rate: float = 0.0, inputs: Mapping[str, Any] | None = None
) -> ResidualSitesHandle:
    """Give a model dropout on what each block's attention and feed-forward network write to the residual stream.

    Llama, Qwen, Gemma and Mistral are built without. What is written, and by which module, is found by running the
    model; that module gets a float ``residual_dropout`` and a forward hook, so the sites are found by `find_sites` and
    take rates from schedules. Modules, names of parameters and saved weights stay what they were, and evaluation mode
    is the plain model. With gradient checkpointing the same elements are dropped in the second forward. Where PEFT is
    used, add the sites after wrapping, so that what the adapter writes is dropped as well.

    Args:
        model: the model, in any mode; it is run once on a tiny batch.
        rate: the rate of all of the sites for now, in [0, 1).
        inputs: keyword arguments of its forward for that run, in the place of the tiny batch.

    Raises:
        ScheduleError: a rate outside of [0, 1).
        SiteError: nothing is written without dropout, the sites are there already, or the model does not run.
    """
    check_rate(ATTRIBUTE, rate)
    if any(residual_owners(module) for module in model.modules()):
        raise SiteError(
            f"{type(model).__name__} has added residual sites already; expected none: remove them first, or turn their "
            "rates by a schedule"
        )
    writes = find_residual_writes(model, inputs)
    if not writes:
        raise SiteError(
            f"found no block of {type(model).__name__} that writes to a residual stream without dropout; expected one "
            "that adds to it, and drops nothing there: use the sites that find_sites lists"
        )
    names = {module: name for name, module in model.named_modules()}
    handle = ResidualSitesHandle(tuple(f"{names[write.module]}.{ATTRIBUTE}" for write in writes))
    for write in writes:
        setattr(write.module, ATTRIBUTE, float(rate))
        handle.on_remove(delattr, write.module, ATTRIBUTE)
        hook_noticed(handle, write.module, write.module.register_forward_hook(ResidualDropout(write)))
    return handle


def added_sites(model: nn.Module, wanted: bool) -> AbstractContextManager[Any]:
    """`add_residual_sites` for the time of a block, if they are wanted."""
    return add_residual_sites(model) if wanted else nullcontext()
