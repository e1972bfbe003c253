"""Which model is this, and are two models the same backbone with different heads?

Names are compared relative to the backbone: ``bert.encoder.layer.0…`` of a ``BertForMaskedLM`` and ``encoder.layer.0…``
of a ``BertModel`` are the same tensor.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def backbone_prefix(model: nn.Module) -> str:
    """``"bert."`` for a model with a head around ``model.bert``; ``""`` where the model is its own backbone."""
    prefix = getattr(model, "base_model_prefix", "")
    return f"{prefix}." if prefix and isinstance(getattr(model, prefix, None), nn.Module) else ""


def backbone_name(model: nn.Module, name: str) -> str:
    """`name` (of a module, parameter or knob) relative to the backbone; names outside of it stay as they are."""
    return name.removeprefix(backbone_prefix(model))


def in_head(model: nn.Module, name: str) -> bool:
    """Whether `name` lies outside the backbone, in a task's or language model's head."""
    return not name.startswith(backbone_prefix(model))


def model_identity(model: nn.Module) -> dict[str, Any]:
    """What is written into artefacts about the model: class, type, where it came from, backbone prefix, size."""
    config = getattr(model, "config", None)
    return {
        "architecture": type(model).__name__,
        "model_type": getattr(config, "model_type", None),
        "name_or_path": getattr(config, "name_or_path", None) or None,
        "backbone_prefix": backbone_prefix(model),
        "num_parameters": sum(p.numel() for p in model.parameters()),
    }
