"""Reading and writing artefacts: JSON and safetensors only, and never half a file.

Every write goes to a temporary neighbour that is put on disk and then renamed, so that a reader, a run that was killed,
or a machine that lost its power sees the old file or the new one and nothing between. A folder takes two renames, since
the old one must first be out of the way: between them there is none of its name. Where a run was killed there, readers
say so (`check_in_place`), and the next write puts the new folder, which is whole by then, in its place.
"""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from guided_dropout.errors import ArtefactError


def _cannot_write(path: Path, error: OSError) -> ArtefactError:
    return ArtefactError(f"cannot write {path}: {error.strerror or error}; choose an output that you may write to")


@contextlib.contextmanager
def staged_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` when the block ends well, remove it otherwise."""
    path = _followed(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
    except OSError as e:
        raise _cannot_write(path, e) from e
    staging = Path(name)
    try:
        yield staging
        staging.chmod(0o666 & ~_umask())
        _put_on_disk(staging)
        os.replace(staging, path)
    except OSError as e:
        raise _cannot_write(path, e) from e
    finally:
        staging.unlink(missing_ok=True)


@contextlib.contextmanager
def staged_folder(path: str | Path, *, own: Sequence[str]) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; put it in `path`'s place when the block ends well.

    What an existing folder at `path` holds is replaced where it is this kind of artefact's own; the rest stays.
    `check_output_folder` sees to it that it is a folder of this kind. A folder that cannot be renamed, for it is where
    a disk is mounted or where this process stands, is written into, one file after the other.

    Args:
        path: the folder to be.
        own: names, as patterns, of what a folder of this kind is made of.
    """
    path = _followed(path)
    _put_in_place(path)
    stays = _stays_where_it_is(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path if stays else path.parent))
    except OSError as e:
        raise _cannot_write(path, e) from e
    old = staging.with_name(staging.name + ".old")
    try:
        yield staging
        staging.chmod(0o777 & ~_umask())
        for file in staging.rglob("*"):
            if file.is_file() and not file.is_symlink():
                _put_on_disk(file)
        if stays:
            _move_into(path, staging, own)
        else:
            if path.exists():
                _carry_over(path, staging, own)
                os.replace(path, old)
            os.replace(staging, path)
    except OSError as e:
        raise _cannot_write(path, e) from e
    finally:
        if old.exists() and not path.exists():  # interrupted between the two
            os.replace(old, path)
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def check_in_place(path: str | Path) -> None:
    """Make sure that a folder is not missing because a run was killed while it took another's place.

    Raises:
        ArtefactError: it is; says under which names the new one and the old one are.
    """
    path = _followed(path)
    for new, old in [] if path.exists() else _left_aside(path):
        if new.exists():
            raise ArtefactError(
                f"no folder {path}: a run that was killed while it replaced it has left {new.name} (the new one) and "
                f"{old.name} (the one before) beside it; expected one of them under that name: rename it, or write "
                "the folder again, which does that"
            )


def _put_in_place(path: Path) -> None:
    """End what a killed `staged_folder` has left half done, if there is any."""
    try:
        for new, old in sorted(_left_aside(path), key=lambda pair: pair[1].stat().st_ctime, reverse=True):
            if new.exists() and not path.exists():
                os.replace(new, path)
            if path.exists():
                shutil.rmtree(new, ignore_errors=True)
                shutil.rmtree(old, ignore_errors=True)
    except OSError as e:
        raise _cannot_write(path, e) from e


def _left_aside(path: Path) -> Iterator[tuple[Path, Path]]:
    """(the whole new folder, what was moved out of its way) of each `staged_folder` that did not come to its end."""
    drawn = "[a-z0-9_]" * 8  # what tempfile's names end with; those of other folders begin with `path`'s and a dot
    for old in path.parent.glob(f".{glob.escape(path.name)}.{drawn}.old"):
        yield old.with_suffix(""), old


def _stays_where_it_is(path: Path) -> bool:
    return path.is_dir() and (os.path.ismount(path) or Path.cwd().is_relative_to(path.resolve()))


def _move_into(path: Path, staging: Path, own: Sequence[str]) -> None:
    made = {entry.name for entry in staging.iterdir()}
    for entry in path.iterdir():
        replaced = any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in own)
        if entry.is_dir() and not entry.is_symlink():
            if replaced:
                shutil.rmtree(entry)
        elif replaced and entry.name not in made:
            entry.unlink()
    for name in sorted(made):
        os.replace(staging / name, path / name)


def _carry_over(path: Path, staging: Path, own: Sequence[str]) -> None:
    """Put what somebody else left in `path` into `staging` too, without reading it where the disk allows that."""

    def link(source: str, target: str) -> str:
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError:
            shutil.copy2(source, target, follow_symlinks=False)
            if not os.path.islink(target):
                _put_on_disk(target)
        return target

    for entry in path.iterdir():
        target = staging / entry.name
        if os.path.lexists(target) or any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in own):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, target, symlinks=True, copy_function=link)
        else:
            link(str(entry), str(target))


def _put_on_disk(file: str | Path) -> None:
    """Without this a new name may outlive a power cut that its content does not."""
    handle = os.open(file, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _followed(path: str | Path) -> Path:
    """What is to be replaced: of a link, what it leads to."""
    path = Path(path)
    return path.resolve() if path.is_symlink() else path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_output_folder(path: str | Path, *, marker: str, begun: str = "") -> Path:
    """Make sure, before any long work, that `path` can be written as a whole.

    Where a run was killed while it replaced `path`, that is brought to its end first.

    Args:
        path: the folder to be.
        marker: name of the file by which a folder of this kind is known. A folder that holds other things but not
            the marker is somebody else's.
        begun: name of a file that is there until another process that has just begun the folder has made the marker.

    Raises:
        ArtefactError: `path` is a file, holds other things, or its parent cannot be written.
    """
    path = Path(path)
    _put_in_place(_followed(path))
    if path.exists() and not path.is_dir():
        raise ArtefactError(f"{path} is a file; expected a folder to write to: choose another --out")
    names = [entry.name for entry in path.iterdir()] if path.is_dir() else []
    known = [name for name in (begun, marker) if name]
    # What a killed process has left half written is nobody's, nor is the probe of older versions.
    whole = [name for name in names if name != ".probe" and not any(name.startswith(f".{own}.") for own in known)]
    if whole and not any(name in whole for name in known):
        raise ArtefactError(
            f"{path} holds other files and no {marker}; expected a new or empty folder, or one that this "
            "command wrote: choose another --out"
        )
    place = path if path.is_dir() else path.parent
    try:
        place.mkdir(parents=True, exist_ok=True)
        # Without a name, or, on a disk that has no such files, with one that is nobody's above.
        tempfile.TemporaryFile(dir=place, prefix=f".{marker}.").close()
    except OSError as e:
        raise _cannot_write(path, e) from e
    return path


def beside(path: Path, suffix: str) -> Path:
    """A path in the same folder as `path`, called as that is and `suffix`; of ``.`` too, which has no name."""
    named = path.resolve() if path.name in ("", "..") else path
    return named.with_name(f"{named.name}{suffix}")


def check_output_file(path: str | Path, *, kind: str) -> Path:
    """Make sure, before any long work, that JSON can be written to `path`, and takes the place of none but its like.

    Args:
        path: the file to be.
        kind: what its ``"kind"`` will be.

    Raises:
        ArtefactError: what is there is no file of this kind, or its folder cannot be made or written to.
    """
    path = Path(path)
    if path.is_file() and (found := _holds(path)) not in (kind, None):
        raise ArtefactError(
            f"{path} is there already and holds {found}; expected a new file, or a {kind} to replace: choose another "
            "name"
        )
    folder = _followed(path).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise _cannot_write(path, e) from e
    return path


def check_no_input(path: str | Path, inputs: Iterable[str | Path]) -> None:
    """Make sure that a result does not take the place of what it is made from.

    Args:
        path: the file or folder to be.
        inputs: files and folders; names of other things, as on the hub, are none.

    Raises:
        ArtefactError: `path` is one of them.
    """
    path = Path(path)
    for given in map(Path, inputs):
        if path.exists() and given.exists() and path.samefile(given):
            raise ArtefactError(
                f"{path} is what the result is made from, and would be gone; expected another place: choose another "
                "--out"
            )


def _holds(path: Path) -> str | None:
    """The kind of a JSON artefact, or words for what else a file holds; None for an empty file."""
    try:
        with open(path, "rb") as file:
            begins = file.read(1)
            value = json.loads(begins + file.read()) if begins == b"{" else begins  # of data, which may be large
    except OSError as e:
        raise _cannot_write(path, e) from e
    except (ValueError, RecursionError):
        return "other data"
    found = value.get("kind") if isinstance(value, dict) else None
    return found if isinstance(found, str) else "other data" if value else None


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, all or nothing."""
    with staged_file(path) as tmp:
        tmp.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, all or nothing. NaN and infinity are refused: JSON has none."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def names_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The ``object_pairs_hook`` of `json.loads`, which takes the last value of a name that stands twice in an object.

    Raises:
        ValueError: a name stands twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"an object gives {next(name for name in found if names.count(name) > 1)} twice")
    return found


def parse_json(text: str) -> Any:
    """What `text` says, taken by its word: it has no NaN, no infinity, and no name of an object stands twice.

    Raises:
        ValueError: it is no such JSON, or nested too deep to read.
    """

    def no_constant(name: str) -> float:
        raise ValueError(f"{name} is no number in JSON")

    def number(kind: type[int] | type[float]) -> Callable[[str], int | float]:
        def read(digits: str) -> int | float:
            if math.isinf(float(digits)):
                raise ValueError(f"the number {digits[:20]} is too large")
            return kind(digits)

        return read

    try:
        return json.loads(
            text,
            object_pairs_hook=names_once,
            parse_constant=no_constant,
            parse_int=number(int),
            parse_float=number(float),
        )
    except RecursionError as e:
        raise ValueError("it is nested too deep") from e


def read_json(path: str | Path, *, kind: str, schema: int | Sequence[int]) -> dict[str, Any]:
    """Read a JSON artefact and check what it says it is.

    Args:
        path: the file.
        kind: expected value of its ``"kind"``, for instance ``"dropout-schedule"``.
        schema: expected value of its ``"schema"``, or those that can be read, the newest first.

    Raises:
        ArtefactError: no such file, not JSON, or of another kind or schema version.
    """
    path = Path(path)
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ArtefactError(f"cannot read {path}: {e.strerror}; expected a {kind} file") from e
    except ValueError as e:
        raise ArtefactError(f"{path} is not valid JSON ({e}); expected a {kind} file: make it again") from e
    found = value.get("kind") if isinstance(value, dict) else type(value).__name__
    if found != kind:
        raise ArtefactError(f"{path} holds {found!r}; expected {kind!r}: give the path of a {kind} file")
    readable = [schema] if isinstance(schema, int) else list(schema)
    if value.get("schema") not in readable:
        raise ArtefactError(
            f"{path} has schema version {value.get('schema')!r}; this version of guided-dropout reads "
            f"{' and '.join(map(str, readable))}: "
            "make the file again or install the version that wrote it"
        )
    return value


def write_tensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors as safetensors, all or nothing."""
    with staged_file(path) as tmp:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, tmp, metadata=metadata)


@contextlib.contextmanager
def _reading(path: str | Path, kind: str, advice: str) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise ArtefactError(f"cannot read {path}: {e.strerror or e}; expected a {kind} file: {advice}") from e
    except SafetensorError as e:
        raise ArtefactError(f"{path} is not a whole {kind} file ({e}); {advice}") from e


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file onto the CPU.

    Raises:
        ArtefactError: no such file, or not a whole safetensors file.
    """
    with _reading(path, "safetensors", "make it again"):
        return load_file(path)


def read_header(path: str | Path, *, kind: str, schema: int, key: str, advice: str) -> dict[str, Any]:
    """Read the JSON in a safetensors file's header, without its tensors, and check what the file says it is.

    Args:
        path: the file.
        kind: expected value of the header's ``"kind"``.
        schema: expected value of its ``"schema"``.
        key: where the JSON stands in it.
        advice: what to do where something is wrong; ends the message.

    Raises:
        ArtefactError: no such file, not a whole one, or of another kind or schema version.
    """
    with _reading(path, kind, advice), safe_open(path, "pt") as file:
        header = file.metadata() or {}
    found = (header.get("kind"), header.get("schema"))
    if found != (kind, str(schema)):
        raise ArtefactError(
            f"{path} holds {found[0]!r}, version {found[1]}; this version of guided-dropout reads {kind!r}, version "
            f"{schema}: {advice}"
        )
    return json.loads(header[key])


def sha256_of(path: str | Path) -> str:
    """The SHA-256 digest of a file in hexadecimal, read in pieces.

    Raises:
        ArtefactError: no such file, or it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as e:
        raise ArtefactError(f"cannot read {path}: {e.strerror or e}; expected a file") from e
