"""Which model is this, and are two models the same backbone with different heads?

Names are compared relative to the backbone: ``bert.encoder.layer.0…`` of a ``BertForMaskedLM`` and ``encoder.layer.0…``
of a ``BertModel`` are the same tensor.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from guided_dropout.adapters import name_before
from guided_dropout.errors import ModelError

_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_PEFT = re.compile(r"^base_model\.(?:model\.)?")  # what its models are called inside of their wrapper
_SAMPLED = 4096  # elements of each tensor that go into a digest


def has_head(model: nn.Module) -> bool:
    """Whether the model names a part of its own as its backbone, around which it has a head."""
    inner = unwrapped(model)
    prefix = getattr(inner, "base_model_prefix", "")
    return bool(prefix) and isinstance(getattr(inner, prefix, None), nn.Module)


def backbone_prefix(model: nn.Module) -> str:
    """``"bert."`` for a model with a head around ``model.bert``; ``""`` where the model is its own backbone.

    Of a model that PEFT has wrapped, the wrapper's own prefix comes before it: ``"base_model.model.bert."``.
    """
    return _wrapper_prefix(model) + (
        f"{getattr(unwrapped(model), 'base_model_prefix')}." if has_head(model) else ""  # noqa: B009
    )


def _wrapper_prefix(model: nn.Module) -> str:
    inner = unwrapped(model)
    return next(f"{name}." if name else "" for name, m in model.named_modules() if m is inner)


def backbone_name(model: nn.Module, name: str) -> str:
    """`name` (of a module, parameter or knob) relative to the backbone; a head's as it is in a model without PEFT."""
    return relative_name(name, backbone_prefix(model))


def names_before(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Each of these names of the model's → what it is in the model without PEFT."""
    wrapper = _wrapper_prefix(model)
    return {name: name_before(name.removeprefix(wrapper)) for name in names}


def relative_name(name: str, prefix: str) -> str:
    """`name` without the backbone's `prefix`, and without what PEFT has put around the model and its layers."""
    inner = name.removeprefix(prefix)
    return name_before(_PEFT.sub("", inner) if inner == name and _PEFT.match(prefix) else inner)


def in_head(model: nn.Module, name: str) -> bool:
    """Whether `name` lies outside the backbone, in a task's or language model's head."""
    return not name.startswith(backbone_prefix(model))


def model_identity(model: nn.Module) -> dict[str, Any]:
    """What two runs on a model must have in common: its class, type, where it came from, backbone prefix, size."""
    config = getattr(model, "config", None)
    return {
        "architecture": type(unwrapped(model)).__name__,
        "model_type": getattr(config, "model_type", None),
        "name_or_path": getattr(config, "name_or_path", None) or None,
        "backbone_prefix": backbone_prefix(model),
        "num_parameters": sum(p.numel() for p in model.parameters()),
    }


def model_record(model: nn.Module) -> dict[str, Any]:
    """What is written into artefacts about the model: `model_identity`, and what tells a person more.

    Returns:
        Besides, for a model from the hub, ``"revision"``: the commit that it was loaded from. It is compared with
        nothing that has a digest of the weights: other commits may hold the same, and so may a local copy.
    """
    revision = getattr(getattr(model, "config", None), "_commit_hash", None)
    return model_identity(model) | ({"revision": revision} if revision else {})


def weights_digest(weights: Mapping[str, Tensor]) -> str | None:
    """16 hexadecimal digits that stand for named weights: names, shapes, and evenly spaced elements of each tensor.

    The elements are rounded to bfloat16, so that a model has one digest whether it is loaded in float32, bfloat16 or
    float64; training moves enough of them over a boundary to be seen. A digest says "the same" or "others", no more.

    Args:
        weights: name → tensor, of any dtype, on any device; the order does not matter.

    Returns:
        None where one is in float16, whose rounding leaves another bfloat16 than the unrounded value has.
    """
    if any(tensor.dtype == torch.float16 for tensor in weights.values()):
        return None
    digest = hashlib.sha256()
    for name in sorted(weights):
        values = weights[name].detach().reshape(-1)
        some = values[:: max(1, len(values) // _SAMPLED)].cpu()
        some = some.to(torch.bfloat16) if some.is_floating_point() else some
        digest.update(f"\n{name} {list(weights[name].shape)} ".encode())
        digest.update(some.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def same_weights(digest: str | None, weights: Mapping[str, Tensor]) -> bool | None:
    """Whether `digest` is that of these weights; None where there is none of the one or of the other."""
    here = None if digest is None else weights_digest(weights)
    return None if here is None else digest == here


def weights_identity(model: nn.Module, names: Collection[str]) -> dict[str, Any]:
    """What is written into artefacts about the weights that something was measured on.

    Args:
        model: it was measured on this.
        names: of its parameters that were measured, as in ``model.named_parameters()``.

    Returns:
        ``"digest"`` of all its weights; and of those of its backbone that were measured, so that they are known again
        under another head, ``"backbone"``: their ``"digest"`` and how many ``"tensors"`` they are. Neither where the
        weights have no digest.
    """
    own = {backbone_name(model, name) for name in names}
    measured = backbone_weights(model, own)
    whole = weights_digest(dict(model.named_parameters()))
    if whole is None:
        return {}
    return {"digest": whole, "backbone": {"digest": weights_digest(measured), "tensors": len(measured)}}


def backbone_weights(model: nn.Module, names: Collection[str]) -> dict[str, nn.Parameter]:
    """Those of these names, relative to the backbone: the same under another head or with adapters.

    The output layer of a language model that is its own backbone (T5's) is a head all the same.
    """
    inner: Any = unwrapped(model)
    output = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    heads = tuple(f"{path}." for path, module in model.named_modules() if output is not None and module is output)
    found: dict[str, nn.Parameter] = {}
    for full, parameter in model.named_parameters():
        name = backbone_name(model, full)
        if name in names and not in_head(model, full) and not full.startswith(heads):
            found.setdefault(name, parameter)  # a layer comes before an adapter's copy of it
    return found


def is_packed(parameter: Tensor) -> bool:
    """Whether it holds quantised weights, whose shape says nothing of theirs."""
    return not (parameter.is_floating_point() or parameter.is_complex())


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model; any other model as it is.

    Raises:
        ModelError: it is wrapped by ``torch.compile``, ``DataParallel`` or ``DistributedDataParallel``, which give all
            names another beginning: the backbone would not be found, and all of it taken for a head, or for pretrained.
    """
    wrapped_in = "_orig_mod" if "_orig_mod" in model._modules else "module" if isinstance(model, _PARALLEL) else None
    if wrapped_in:
        raise ModelError(
            f"{type(model).__name__} is wrapped around a model; expected the model itself: give model.{wrapped_in}"
        )
    inner: Any = getattr(model, "get_base_model", None)
    return inner() if inner is not None and hasattr(model, "peft_config") else model
