"""Mixtures of experts, run so that each expert is an operation of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def experts_apart(model: nn.Module) -> Iterator[None]:
    """Within, transformers' experts are looped over rather than grouped into one kernel, which takes any precision."""
    from transformers import PreTrainedModel

    switch = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m._can_set_experts_implementation()]
    before = [(m, m.get_experts_implementation()) for m in switch]
    try:
        for m in switch:
            m.set_experts_implementation("eager")
        yield
    finally:
        for m, implementation in before:
            m.set_experts_implementation(implementation)
