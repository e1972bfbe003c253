"""Where text comes from: a file, a folder or a hub data set, read anew each time and never held whole."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guided_dropout.artefacts import names_once
from guided_dropout.compression import SUFFIXES, UNREADABLE, open_bytes
from guided_dropout.errors import DataError, describe

HUB = "hub:"
_SUFFIXES = {".txt", ".jsonl", *SUFFIXES}
# UTF-8 though some of them are, their lines are no prose: commas, braces and file headers would be measured.
_NO_PROSE = (".csv", ".tsv", ".json", ".parquet", ".tar")
# What JSON calls the values that are no text.
_KINDS = {
    type(None): "null", bool: "true or false", int: "a number", float: "a number", list: "an array", dict: "an object",
}  # fmt: skip
# A line longer than this counts as several: memory does not depend on where a text has its line ends.
_LONGEST_LINE = 1 << 18


@dataclass
class Text:
    """Paragraphs, stripped and none blank; each iteration reads them again from the start.

    Attributes:
        name: what a person calls it.
        lines: opens the source.
        max_characters: stop after the paragraph that reaches so many; None for all.
        ignored: names of a folder's files that are no text.
        cut: whether the latest iteration ended because of `max_characters`.

    Raises:
        DataError: on iteration; the source cannot be read, or has nothing but blank lines.
    """

    name: str
    lines: Callable[[], Iterator[str]]
    max_characters: int | None = None
    ignored: tuple[str, ...] = ()
    cut: bool = field(default=False, init=False)

    def __iter__(self) -> Iterator[str]:
        self.cut = False
        characters = 0
        for line in self.lines():
            paragraph = line.strip()
            if not paragraph:
                continue
            if self.max_characters is not None and characters >= self.max_characters:
                self.cut = True
                return
            characters += len(paragraph)
            yield paragraph
        if not characters:
            raise DataError(f"{self.name} has no text; expected at least one line that is not blank")


def stream_text(source: str | Path, *, max_characters: int | None = None) -> Text:
    """Open a source of text; its first paragraph is read at once, so that a mistake comes up early.

    Args:
        source: a UTF-8 file (a paragraph a line; ``.jsonl`` with a ``text`` in each line; either may be ``.gz`` or
            ``.xz``), a folder (all its ``.txt``, ``.jsonl``, ``.gz`` and ``.xz`` files, however deep and behind links
            too, sorted by path), or ``hub:NAME[:CONFIG[:SPLIT[:COLUMN]]]``: a data set of the hub, or in a folder laid
            out like one, streamed by `datasets` (split ``train``, column ``text`` where not given).
        max_characters: see `Text`.

    Raises:
        DataError: no such source, not readable, not UTF-8, nothing in it, a table or an archive, a pipe, which can be
            read only once, or a limit below 1.
    """
    if max_characters is not None and max_characters < 1:
        raise DataError(f"at most {max_characters} characters; expected at least 1")
    if not str(source):
        raise DataError(f"a text without a name; expected a file, a folder, or {HUB}NAME")
    path = Path(source)
    if str(source).startswith(HUB):
        text = Text(str(source), _hub_lines(str(source)), max_characters)
    elif path.is_dir():
        files = _files_below(path)
        wanted = {n for n, p in files.items() if p.suffix.lower() in _SUFFIXES and _inner_suffix(p) not in _NO_PROSE}
        if lost := sorted(name for name in wanted if not files[name].exists()):
            raise DataError(
                f"{path / lost[0]} is a link that leads nowhere ({os.readlink(files[lost[0]])}); expected a text: "
                "fetch what it leads to, or remove it"
            )
        readable = _each_once({name: files[name] for name in wanted})
        if not readable:
            raise DataError(f"no text in the folder {source}; expected .txt, .jsonl, .gz or .xz files: add some")
        text = Text(
            str(source),
            lambda: (line for name in readable for line in _file_lines(files[name])),
            max_characters,
            tuple(sorted(files.keys() - wanted)),
        )
    else:
        if path.exists() and (inner := _inner_suffix(path)) in _NO_PROSE:
            raise DataError(
                f"{path} is a {inner} file, whose lines are no prose; expected text: write it to a .txt, a paragraph a "
                "line, or to a .jsonl with a field 'text' in each line"
            )
        if path.exists() and not path.is_file():
            raise DataError(
                f"{path} is no file but a pipe or a device, which can be read only once; expected a text that can be "
                "read again: write it to a file first"
            )
        text = Text(str(source), lambda: _file_lines(path), max_characters)
    next(iter(text))
    return text


def _files_below(folder: Path) -> dict[str, Path]:
    """Path relative to `folder` → file, or link to nothing. Each folder is read once, whatever links lead to it."""

    def failed(e: OSError) -> None:
        raise DataError(
            f"cannot read the folder {e.filename}: {e.strerror}; expected one whose text can be read: change its "
            "permissions, or leave it out"
        ) from e

    found, seen = {}, {os.path.realpath(folder)}
    for place, folders, files in os.walk(folder, followlinks=True, onerror=failed):
        below = []
        for name in sorted(folders, key=lambda name: (os.path.islink(os.path.join(place, name)), name)):
            real = os.path.realpath(os.path.join(place, name))
            if real not in seen:
                seen.add(real)
                below.append(name)
        folders[:] = below
        for path in (Path(place, name) for name in files):
            if path.is_file() or (path.is_symlink() and not path.exists()):
                found[path.relative_to(folder).as_posix()] = path
    return found


def _each_once(files: Mapping[str, Path]) -> list[str]:
    """Names in their order; of those that lead to one file the first, one that is no link before those that are."""
    own: dict[str, str] = {}
    for name in sorted(files, key=lambda name: (files[name].is_symlink(), name)):
        own.setdefault(os.path.realpath(files[name]), name)
    return sorted(own.values())


def _inner_suffix(path: Path) -> str:
    """Its ending before that of the compression."""
    return (path.with_suffix("") if path.suffix.lower() in SUFFIXES else path).suffix.lower()


def _file_lines(path: Path) -> Iterator[str]:
    inner = _inner_suffix(path)
    done = 0
    try:
        with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig") as f:
            lines = _json_texts(f, path) if inner == ".jsonl" else iter(lambda: f.readline(_LONGEST_LINE), "")
            for line in lines:
                done += 1
                yield line
    except UNREADABLE as e:
        reason = getattr(e, "strerror", None) or e
        raise DataError(f"cannot read the text {path}: {reason}; expected a text file (.txt, .jsonl, .gz, .xz)") from e
    except UnicodeDecodeError as e:
        raise DataError(f"{path} is not UTF-8 (after line {done}); expected UTF-8 text: convert it first") from e


def _json_texts(lines: Iterator[str], path: Path) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line, object_pairs_hook=names_once) if line.strip() else {"text": ""}
        except (ValueError, RecursionError) as e:  # too many digits or brackets are JSON, but not to Python
            reason = getattr(e, "msg", e)
            raise DataError(f"{path}:{number} is not valid JSON ({reason}); expected an object with a text") from e
        yield from _lines_of(row, "text", f"{path}:{number}")


def _hub_lines(source: str) -> Callable[[], Iterator[str]]:
    name, *rest = source.removeprefix(HUB).split(":")
    if not name or len(rest) > 3:
        raise DataError(f"text {source!r}; expected {HUB}NAME, or {HUB}NAME:CONFIG:SPLIT:COLUMN, of a data set")
    config, split, column = (*rest, "", "", "")[:3]
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ModuleNotFoundError as e:
        raise DataError(
            f"reading {source} needs the `datasets` package: pip install 'guided-dropout[hub]', or give a text file"
        ) from e

    @contextlib.contextmanager
    def named_errors() -> Iterator[None]:
        try:
            yield
        except DataError:
            raise
        except (OSError, ValueError, KeyError, DatasetsError) as e:
            reason = (str(e).strip().splitlines() or [type(e).__name__])[0].rstrip(".")
            raise DataError(
                f"cannot read {source} ({reason}); expected a data set: check its name, configuration and split, and "
                "the connection"
            ) from e

    with named_errors():
        table = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)

    def lines() -> Iterator[str]:
        with named_errors():
            for number, row in enumerate(table):
                yield from _lines_of(row, column or "text", f"{source}, row {number}")

    return lines


def _lines_of(row: Any, column: str, where: str) -> Iterator[str]:
    value = row.get(column) if isinstance(row, dict) else None
    if not isinstance(value, str):
        if isinstance(row, dict) and column in row:
            kind = _KINDS.get(type(value)) or describe(value)
            raise DataError(f"{where} holds {kind} named {column!r}; expected a text of that name")
        found = ", ".join(map(str, row)) if isinstance(row, dict) else _KINDS.get(type(row)) or describe(row)
        raise DataError(f"{where} holds {found or 'nothing'}; expected a text named {column!r}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as e:  # half of a pair of code units, which JSON lets through
            raise DataError(f"{where} holds {value[e.start]!r}, which is no character; expected text: mend it") from e
    yield from value.split("\n")
