"""The files that an unfinished run leaves, from which it goes on; those of another run, and its result, are refused.

One safetensors file per process, replaced as a whole, its facts as JSON in its header, so that no kill can leave
tensors of one moment with facts of another. The files of all processes lie in one folder.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guided_dropout.artefacts import read_header
from guided_dropout.errors import ArtefactError

_ABSENT: Any = object()


@dataclass(frozen=True)
class RunFiles:
    """How the files of one kind of run are named, and what their headers say.

    Attributes:
        kind: in the header.
        schema: likewise.
        key: of the facts in the header; their ``"run"`` says what makes a run what it is.
        name: of a file, with places for the process's number, from 1, and for the number of processes.
    """

    kind: str
    schema: int
    key: str
    name: str

    def file(self, folder: str | Path, process: int, processes: int) -> Path:
        """Where a process, counted from 0, writes."""
        return Path(folder) / self.name.format(process + 1, processes)

    def there(self, folder: str | Path) -> list[Path]:
        """The files of all processes that lie in `folder`, in order."""
        return sorted(Path(folder).glob(self.name.format("*", "*")))

    def header(self, facts: Mapping[str, Any]) -> dict[str, str]:
        """The header of a file with these facts."""
        return {"format": "pt", "kind": self.kind, "schema": str(self.schema), self.key: json.dumps(dict(facts))}

    def facts(self, file: Path) -> dict[str, Any]:
        """What `header` was given.

        Raises:
            ArtefactError: the file is damaged, or of another kind or schema version.
        """
        advice = "start afresh with --no-resume"
        return read_header(file, kind=self.kind, schema=self.schema, key=self.key, advice=advice)

    def check_run(self, file: Path, run: Mapping[str, Any]) -> None:
        """Refuse a file of another run than `run`, which is as JSON gives it back.

        Raises:
            ArtefactError: it is one, and what differs is told from both sides; or it is damaged.
        """
        odd = differences(self.facts(file)["run"], run)
        if odd:
            raise ArtefactError(
                f"{file} is of another run: {odd}; expected the same run to resume: give the arguments as they were, "
                "or --no-resume to start afresh"
            )

    def check_unused(self, folder: str | Path, done: Callable[[Path], int], what: str) -> None:
        """Refuse to begin a new run where the state of another lies: hours of work may be in it.

        Args:
            folder: where it would lie.
            done: how much was done, by a file.
            what: is counted, in the plural.

        Raises:
            ArtefactError: there is one.
        """
        files = self.there(folder)
        if files:
            raise ArtefactError(
                f"{folder} holds the state of an unfinished run ({sum(map(done, files)):,} {what}); expected to be "
                "told what to do with it: --resume to go on from there, --no-resume to start afresh"
            )

    def remove(self, folder: str | Path, *further: str) -> None:
        """Remove them, with what a kill left half written, and the folder if nothing else is in it.

        Args:
            folder: where they lie.
            further: patterns of the names of other files of the run, which go too.
        """
        folder = Path(folder)
        names = [self.name.format("*", "*"), *further]
        # safetensors, too, writes under a name of its own before it renames.
        for pattern in (*names, *(f".{name}.*" for name in names), ".tmp??????"):
            for file in folder.glob(pattern):
                file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()


def check_finished(found: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse the result of another run than the one that is resumed.

    Args:
        found: what it is and where, as ``"DIR holds the profile"``.
        there: what its run was.
        here: what this run is.

    Raises:
        ArtefactError: they differ; what differs is told from both sides.
    """
    if odd := differences(_as_read(there), _as_read(here)):
        raise ArtefactError(
            f"{found} of another run: {odd}; expected the same run to resume: give the arguments as "
            "they were, another --out, or --no-resume to measure again"
        )


def _as_read(facts: Mapping[str, Any]) -> dict[str, Any]:
    """As they come back from a file."""
    return json.loads(json.dumps(dict(facts)))


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What differs between two runs, both sides of it: ``seed was 1, is 2; …``; empty where nothing does."""
    odd = differing(there, here, absent=_ABSENT)
    return "; ".join(f"{name} was {_shown(a)}, is {_shown(b)}" for name, a, b in odd)


def differing(there: Mapping[str, Any], here: Mapping[str, Any], *, absent: Any = None) -> list[tuple[str, Any, Any]]:
    """In what two nested mappings differ: its name (``"recipe.epochs"``), its value there and its value here.

    Args:
        there: one.
        here: the other; a list is the same as a tuple, since a file has lists alone.
        absent: the value of what one of them lacks.
    """
    a, b = dict(_flat(there)), dict(_flat(here))
    both = [(name, a.get(name, absent), b.get(name, absent)) for name in {**b, **a}]
    return [(name, x, y) for name, x, y in both if _as_list(x) != _as_list(y)]


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    return "not given" if value is _ABSENT else json.dumps(value)
