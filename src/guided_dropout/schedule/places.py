"""Where a site stands in a model, read from its path: which layer, and the same place in every layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """A site's place.

    Attributes:
        role: the path with ``*`` for the layer's number: the same for the same place in each layer.
        layer: the first number in the path; None for a site outside of the layers.
    """

    role: str
    layer: int | None


def place_of(path: str) -> Place:
    """``encoder.layer.3.output.dropout`` → role ``encoder.layer.*.output.dropout``, layer 3."""
    parts = path.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if at is None:
        return Place(path, None)
    return Place(".".join([*parts[:at], "*", *parts[at + 1 :]]), int(parts[at]))


def by_role(paths: Iterable[str]) -> dict[str, list[str]]:
    """Role → its paths, both in the order in which they come."""
    roles: dict[str, list[str]] = {}
    for path in paths:
        roles.setdefault(place_of(path).role, []).append(path)
    return roles
