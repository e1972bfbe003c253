"""What a saved profile's JSON must hold, looked at once when it is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from guided_dropout.errors import ArtefactError, describe


def check_facts(file: Path, facts: Mapping[str, Any], names: list[str]) -> None:
    """Make sure that a profile's JSON has all of `names`, each of its own form, and a mean for each shape.

    Raises:
        ArtefactError: it has not; the first that is missing or of another form is named.
    """
    for name in sorted(names):
        if name not in facts:
            raise ArtefactError(f"{file} has no {name!r}; expected a whole fisher-profile: make it again")
        form, holds = _FORMS[name]
        if not holds(facts[name]):
            found = describe(facts[name]) if isinstance(facts[name], dict | list | None) else repr(facts[name])
            raise ArtefactError(f"{file} has {found} for {name!r}; expected {form}: copy or make it again")
    if odd := sorted(facts["tensor_means"].keys() ^ facts["shapes"].keys()):
        has, lacks = ("mean", "shape") if odd[0] in facts["tensor_means"] else ("shape", "mean")
        raise ArtefactError(f"{file} has a {has} but no {lacks} of {odd[0]}; expected both: copy or make it again")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_positive(value: object) -> bool:
    return _is_count(value) and value != 0


def _is_mean(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _is_mapping(value: object, holds: Callable[[Any], bool] = lambda _: True) -> bool:
    return isinstance(value, dict) and all(map(holds, value.values()))


def _is_list(value: object, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(holds, value))


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_shape(value: object) -> bool:
    return _is_list(value, _is_count)


_TEXT = ("a text", _is_text)
_MAPPING = ("an object", _is_mapping)
_COUNT = ("a whole number from 0", _is_count)
_FORMS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "objective": _TEXT,
    "reduction": _TEXT,
    "labels": ("'data' or 'model'", lambda value: value in ("data", "model")),
    "num_samples": ("a whole number from 1", _is_positive),
    "num_skipped": _COUNT,
    "model": _MAPPING,
    "coverage": _MAPPING,
    "provenance": _MAPPING,
    "noise": ("a list of names", lambda value: _is_list(value, _is_text)),
    "tensor_means": ("a number from 0 for each tensor", lambda value: _is_mapping(value, _is_mean)),
    "shapes": ("a list of whole numbers for each tensor", lambda value: _is_mapping(value, _is_shape)),
    "values": (
        "null, or an object with the sha256 of the file of values",
        lambda value: value is None or (_is_mapping(value) and _is_text(value.get("sha256"))),
    ),
}
