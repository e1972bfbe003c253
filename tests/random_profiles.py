"""Profiles with values as uneven as real ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from families import profile_of

from guided_dropout.fisher import FisherProfile


def random_profile(model: torch.nn.Module, **changes: Any) -> FisherProfile:
    """Values over many orders of magnitude, none equal."""
    generator = torch.Generator().manual_seed(3)
    diagonal = {n: torch.randn(p.shape, generator=generator).mul(3).exp() for n, p in model.named_parameters()}
    means = {name: float(t.double().mean()) for name, t in diagonal.items()}
    return replace(profile_of(model), diagonal=diagonal, tensor_means=means, **changes)
