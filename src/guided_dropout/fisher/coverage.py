"""What a profile says about how each parameter's Fisher was found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def coverage(parameters: Mapping[str, Tensor], fallback: Mapping[str, str], untouched: list[str]) -> dict[str, Any]:
    """How the Fisher of each parameter was found, for the profile.

    Args:
        parameters: name → parameter.
        fallback: parameters that took the loop over the samples → why.
        untouched: names that `untouched` gave.

    Returns:
        ``parameters_by_rule`` (share, by count), ``fallback`` (names), ``reasons`` (name → why it took the loop), and
        ``untouched``.
    """
    size = sum(p.numel() for p in parameters.values())
    by_rule = sum(p.numel() for n, p in parameters.items() if n not in fallback)
    return {
        "parameters_by_rule": by_rule / size,
        "fallback": sorted(fallback),
        "reasons": {n: fallback[n] for n in sorted(fallback)},
        "untouched": untouched,
    }


def untouched(name: str, sums: Tensor) -> list[str]:
    """The parameter, or its slices such as ``experts.down_proj[3]``, whose sums of squares are all exactly zero.

    No sample reached them: experts that no token was sent to, a pooler that the loss does not depend on. Slices are
    looked at where a parameter stacks matrices; a single number (scores only) shows the whole alone.
    """
    if not sums.any():
        return [name]
    if sums.dim() < 3:
        return []
    return [f"{name}[{i}]" for i in (~sums.flatten(1).any(1)).nonzero()[:, 0].tolist()]
