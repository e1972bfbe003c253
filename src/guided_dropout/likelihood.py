"""Settings under which a model's loss is the likelihood of its targets alone, and its output has names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

_ROUTER = "output_router_logits"  # which adds a term to the loss that keeps experts balanced in training
_SETTINGS = {"return_dict": True, _ROUTER: False, "sparse_prediction": False}


@contextlib.contextmanager
def likelihood_alone(model: nn.Module) -> Iterator[None]:
    """Within, `model` adds nothing to the likelihood of its targets, and gives logits at each position, by name."""
    changed = [
        (holder, name, getattr(holder, name))
        for holder in _holders(model)
        for name, wanted in _SETTINGS.items()
        if getattr(holder, name, wanted) not in (wanted, None)
    ]
    try:
        for holder, name, _ in changed:
            setattr(holder, name, _SETTINGS[name])
        yield
    finally:
        for holder, name, old in changed:
            setattr(holder, name, old)


def terms_left_out(model: nn.Module) -> dict[str, str]:
    """What `likelihood_alone` leaves out of the loss that `model` is set to compute, for a profile's provenance."""
    on = any(getattr(holder, _ROUTER, False) for holder in _holders(model))
    return {"left_out": "the auxiliary loss of its routers"} if on else {}


def _holders(model: nn.Module) -> list[Any]:
    """The configurations of a model and its parts, and the parts, some of which keep a setting of their own."""
    modules = list(model.modules())
    configs = {id(c): c for module in modules if (c := getattr(module, "config", None)) is not None}
    return [*configs.values(), *modules]
