"""A schedule as a JSON file: one entry for each site, keyed by its path."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

from guided_dropout.artefacts import read_json, write_json
from guided_dropout.errors import ArtefactError, describe

if TYPE_CHECKING:
    from guided_dropout.schedule.schedule import DropoutSchedule

KIND = "dropout-schedule"
SCHEMA = 2


def facts_of(schedule: DropoutSchedule) -> dict[str, Any]:
    """What is written, as plain data."""
    return {
        "kind": KIND,
        "schema": SCHEMA,
        "shape": schedule.shape,
        "grouping": schedule.grouping,
        "aggregate": schedule.aggregate,
        "upper": schedule.upper,
        "lower": schedule.lower,
        "mean_rate": schedule.mean_rate,
        "sites": {
            path: {"rate": rate, "score": schedule.scores.get(path), "kind": schedule.kinds.get(path)}
            for path, rate in schedule.rates.items()
        },
        "derived_from": dict(schedule.derived_from),
        "profile": dict(schedule.profile),
        "model": dict(schedule.model),
    }


def write_schedule(path: str | Path, schedule: DropoutSchedule) -> Path:
    """Write it, all or nothing; return the path."""
    write_json(path, facts_of(schedule))
    return Path(path)


def read_schedule(path: str | Path) -> dict[str, Any]:
    """The arguments of `DropoutSchedule` from a file of schema 2 or 1.

    Raises:
        ArtefactError: no such file, another kind of file or schema version, or something is missing in it.
    """
    return arguments_of(read_json(path, kind=KIND, schema=(SCHEMA, 1)), str(path))


def arguments_of(facts: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The arguments of `DropoutSchedule` from what `facts_of` gave, now or in schema 1, and `source` kept.

    Raises:
        ArtefactError: something is missing in it, or is of a wrong type.
    """
    try:
        arguments = _from_schema_1(facts) if facts["schema"] == 1 else _from_schema_2(facts)
        _check_types(arguments)
        return arguments
    except KeyError as e:
        raise ArtefactError(f"{source} has no {e}; expected a whole {KIND} file: make it again") from e
    except (AttributeError, TypeError) as e:
        raise ArtefactError(f"{source} is damaged ({e}); expected a whole {KIND} file: make it again") from e


def digest(facts: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that stand for plain data."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _from_schema_2(facts: Mapping[str, Any]) -> dict[str, Any]:
    names = ("shape", "grouping", "aggregate", "upper", "lower", "model", "profile", "derived_from")
    sites = facts["sites"].items()
    return {name: facts[name] for name in names} | {
        "rates": {path: site["rate"] for path, site in sites},
        "scores": {path: site["score"] for path, site in sites},
        "kinds": {path: site["kind"] for path, site in sites if site["kind"]},
    }


def _check_types(arguments: Mapping[str, Any]) -> None:
    """Refuse, as a TypeError or KeyError, what would fail only where the schedule is used; rates are checked there."""
    model = _a(dict, "model", arguments["model"])
    for name in ("shape", "grouping", "aggregate"):
        _a(str, name, arguments.get(name, ""))
    for name in ("upper", "lower"):
        _a((int, float), name, arguments[name])
    if profile := _a(dict, "profile", arguments.get("profile", {})):
        _a(int, "the profile's num_samples", profile["num_samples"])
        _a(str, "the profile's objective", profile["objective"])
        for name in ("digest", "text", "date"):
            _a((str, NoneType), f"the profile's {name}", profile.get(name))
    if source := _a(dict, "derived_from", arguments.get("derived_from", {})):
        for name in ("digest", "shape", "grouping", "aggregate"):
            _a(str, f"the {name} in derived_from", source[name])
        _a((int, float), "the mean_rate in derived_from", source["mean_rate"])
    _a(dict, "rates", arguments["rates"])
    for path, score in _a(dict, "scores", arguments["scores"]).items():
        _a((int, float, NoneType), f"the score of {path}", score)
    for path, kind in arguments.get("kinds", {}).items():
        _a(str, f"the kind of {path}", kind)
    _a((str, NoneType), "the model's model_type", model["model_type"])
    _a(str, "the model's backbone_prefix", model["backbone_prefix"])
    for name, shape in _a(dict, "the model's shapes", model["shapes"]).items():
        for side in _a(list, f"the shape of {name}", shape):
            _a(int, f"a side of {name}", side)


def _a(kind: type | tuple[type, ...], what: str, value: Any) -> Any:
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join("null" if k is NoneType else k.__name__ for k in kinds)
        raise TypeError(f"{what} is {describe(value)}, not {wanted}")
    return value


def _from_schema_1(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Schema 1 had the aggregate ``tensor_mean`` only, which is the default, and kept neither kinds nor origins."""
    names = ("rates", "scores", "shape", "grouping", "upper", "lower", "model", "profile")
    return {name: facts[name] for name in names}
