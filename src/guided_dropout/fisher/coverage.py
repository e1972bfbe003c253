"""What a profile says about how each parameter's Fisher was found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from guided_dropout.fisher.operations import View


def coverage(
    parameters: Mapping[str, Tensor],
    fallback: Mapping[str, str],
    touched: Mapping[str, Iterable[View | None]] | None = None,
    sums: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """How the Fisher of each parameter was found, for the profile.

    Args:
        parameters: name → parameter.
        fallback: parameters that took the loop over the samples → why.
        touched: parameters that met a sample in any operation → which elements of them; None for all. Where it is not
            given, nothing is said about it.
        sums: name → sums of squares; an expert that only padding reached has none.

    Returns:
        ``parameters_by_rule`` (share, by count), ``fallback`` (names), ``reasons`` (name → why it took the loop), and
        where it is known ``untouched``: parameters, or slices of them such as ``experts.down_proj[3]``, that no sample
        reached; their Fisher is zero.
    """
    size = sum(p.numel() for p in parameters.values())
    by_rule = sum(p.numel() for n, p in parameters.items() if n not in fallback)
    found: dict[str, Any] = {
        "parameters_by_rule": by_rule / size,
        "fallback": sorted(fallback),
        "reasons": {n: fallback[n] for n in sorted(fallback)},
    }
    if touched is not None:
        found["untouched"] = [
            name for n, p in parameters.items() for name in _untouched(n, p, touched.get(n), (sums or {}).get(n))
        ]
    return found


def _untouched(name: str, p: Tensor, views: Iterable[View | None] | None, sums: Tensor | None) -> list[str]:
    views = None if views is None else set(views)
    if not views:
        return [name]
    if None in views:
        return []
    met = torch.zeros_like(p, dtype=torch.bool, requires_grad=False)
    for view in views:
        if view is not None:
            view.within(met).fill_(True)
    if p.dim() < 3 or View.of(p, p) in views:
        return []
    if sums is not None and sums.shape == p.shape:
        met &= sums != 0
    missed = (~met.flatten(1).any(1)).nonzero()[:, 0].tolist()
    return [name] if len(missed) == len(p) else [f"{name}[{i}]" for i in missed]
