"""Where a site stands in a model, read from its path: which layer, and the same place in every layer."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """A site's place.

    Attributes:
        role: the path with ``*`` for the layer's number: the same for the same place in each layer.
        layer: the first number in the path; where a layer is called again and again, which of its calls, counted over
            all of them; None for a site outside of the layers.
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


def places(paths: Iterable[str]) -> dict[str, Place]:
    """Path of each site → its place.

    A site of one call, ``attention.dropout[2]``, is the same place in another layer where one layer is called again and
    again, as ALBERT's: the calls of two knobs of it take turns. The calls of a knob that is used in several places of
    one layer (ViT's, XLNet's), or before and after all of them (T5's), are places of their own.

    Args:
        paths: all sites of a model, in the order of their first call.
    """
    paths = list(paths)
    calls: dict[str, list[int]] = {}
    for at, path in enumerate(paths):
        if path.endswith("]"):
            calls.setdefault(path[: path.rindex("[")], []).append(at)
    found = {path: place_of(path) for path in paths}
    for knob, own in calls.items():
        if any(_take_turns(own, other) or _take_turns(other, own) for other in calls.values()):
            place = place_of(knob)
            for k, at in enumerate(own):
                found[paths[at]] = Place(f"{place.role}[*]", (place.layer or 0) * len(own) + k)
    return found


def by_role(paths: Iterable[str]) -> dict[str, list[str]]:
    """Role → its paths, both in the order in which they come; see `places`."""
    roles: dict[str, list[str]] = {}
    for path, place in places(paths).items():
        roles.setdefault(place.role, []).append(path)
    return roles


def _take_turns(first: Sequence[int], second: Sequence[int]) -> bool:
    turns = [at for pair in zip(first, second, strict=False) for at in pair]
    return len(first) == len(second) > 1 and all(a < b for a, b in itertools.pairwise(turns))
