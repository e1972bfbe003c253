"""What a profile says about how each parameter's Fisher was found, and what a person is told of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

# How many names a sentence has.
_NAMED = 10


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


def told(found: Mapping[str, Any], quote: str = "") -> list[str]:
    """Sentences about a profile's ``coverage``: one for each reason to take the loop, and one of what is `untouched`.

    Args:
        found: what `coverage` gave; earlier profiles, and some that were merged, lack the reasons or what is untouched.
        quote: around each name.
    """
    by_reason: dict[str | None, list[str]] = {}
    for name in found.get("fallback", []):
        by_reason.setdefault(found.get("reasons", {}).get(name), []).append(name)
    sentences = [
        f"one sample at a time{f' ({why})' if why else ''}: {_listed(names, quote)}" for why, names in by_reason.items()
    ]
    if names := found.get("untouched", []):
        sentences.append(f"reached by no sample, so that their values are 0: {_listed(names, quote)}")
    return sentences


def _listed(names: Sequence[str], quote: str) -> str:
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(f"{quote}{name}{quote}" for name in names[:_NAMED]) + more
