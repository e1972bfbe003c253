"""Which points are done, on disk: a run that was killed goes on with the point that was missing.

One safetensors file per process, replaced as a whole, its facts in the header; any number of processes may go on where
others stopped.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from guided_dropout.artefacts import read_tensors, write_tensors
from guided_dropout.errors import ArtefactError
from guided_dropout.fisher.checkpoint import differences

KIND = "landscape-checkpoint"
SCHEMA = 1
DIRECTIONS_NAME = "direction-{}.safetensors"
_NAME = "points-{}-of-{}.safetensors"
# Seconds: points that take less are written together, and a kill loses no more than that.
WRITE_EVERY = 1.0


class Record:
    """The losses so far, of a number of rays with the same points each.

    Args:
        rays: how many.
        points: of each.
        dims: directions of each.
        folder: where to write; nowhere if None.
        run: what makes a run what it is; a file of another run is refused.
        process: this process's number, from 0.
        processes: how many there are.

    Attributes:
        losses: [rays, points] float64; 0 where not done.
        done: like `losses`, bool.
        lengths: [rays, dims] float64, the length of each ray's directions; 0 where no point is done.
        moved: [rays] int64, how many parameters they move.
    """

    def __init__(
        self,
        rays: int,
        points: int,
        dims: int,
        *,
        folder: str | Path | None = None,
        run: Mapping[str, Any] | None = None,
        process: int = 0,
        processes: int = 1,
    ):
        self.losses = torch.zeros(rays, points, dtype=torch.float64)
        self.done = torch.zeros(rays, points, dtype=torch.bool)
        self.lengths = torch.zeros(rays, dims, dtype=torch.float64)
        self.moved = torch.zeros(rays, dtype=torch.int64)
        self.folder = None if folder is None else Path(folder)
        self._run = json.loads(json.dumps(dict(run or {})))
        self._name = _NAME.format(process + 1, processes)
        self._written, self._dirty = time.monotonic(), False

    def read(self) -> None:
        """Take up what the files in the folder hold, those of all processes.

        Raises:
            ArtefactError: one is damaged or of another run; what differs is told from both sides.
        """
        for path in _files(self.folder) if self.folder else ():
            odd = differences(_header(path)["run"], self._run)
            if odd:
                raise ArtefactError(
                    f"{path} is of another run: {odd}; expected the same run to resume: give the arguments as they "
                    "were, or --no-resume to start afresh"
                )
            there = read_tensors(path)
            done = there["done"]
            self.losses[done], self.done = there["losses"][done], self.done | done
            begun = done.any(1)
            self.lengths[begun], self.moved[begun] = there["lengths"][begun], there["moved"][begun]

    def begin(self, ray: int, lengths: list[float], moved: int) -> None:
        """Note what a ray's directions are."""
        self.lengths[ray], self.moved[ray] = torch.tensor(lengths, dtype=torch.float64), moved

    def add(self, ray: int, point: int, loss: float) -> None:
        """Note a loss, and write all if the last time was a second ago.

        Raises:
            ArtefactError: it cannot be written.
        """
        self.losses[ray, point], self.done[ray, point], self._dirty = loss, True, True
        if time.monotonic() - self._written >= WRITE_EVERY:
            self.write()

    def write(self) -> None:
        """Write what is new, if anything.

        Raises:
            ArtefactError: it cannot be written.
        """
        if self.folder is None or not self._dirty:
            return
        header = {"format": "pt", "kind": KIND, "schema": str(SCHEMA), "run": json.dumps({"run": self._run})}
        write_tensors(self.folder / self._name, self.tensors(), header)
        self._written, self._dirty = time.monotonic(), False

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name."""
        return {"losses": self.losses, "done": self.done, "lengths": self.lengths, "moved": self.moved}


def holds_points(folder: str | Path) -> bool:
    """Whether points of an unfinished run lie in `folder`."""
    return bool(_files(Path(folder)))


def check_unused(folder: str | Path) -> None:
    """Refuse to begin a new run where points of another lie: hours of work may be in them.

    Raises:
        ArtefactError: there are some.
    """
    files = _files(Path(folder))
    if files:
        done = sum(int(read_tensors(path)["done"].sum()) for path in files)
        raise ArtefactError(
            f"{folder} holds {done:,} points of an unfinished run; expected to be told what to do with them: --resume "
            "to go on from there, --no-resume to start afresh"
        )


def remove_record(folder: str | Path) -> None:
    """Remove the points of a run, and the folder if nothing else is in it."""
    folder = Path(folder)
    hidden = [*folder.glob(f".{_NAME.format('*', '*')}.*"), *folder.glob("." + DIRECTIONS_NAME.format("*") + ".*")]
    for path in [*_files(folder), *hidden, *folder.glob(DIRECTIONS_NAME.format("*"))]:
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob(_NAME.format("*", "*")))


def _header(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
    except (OSError, SafetensorError) as e:
        raise ArtefactError(f"{path} is not a whole checkpoint ({e}); start afresh with --no-resume") from e
    found = (header.get("kind"), header.get("schema"))
    if found != (KIND, str(SCHEMA)):
        raise ArtefactError(
            f"{path} holds {found[0]!r}, version {found[1]}; this version of guided-dropout reads {KIND!r}, version "
            f"{SCHEMA}: start afresh with --no-resume"
        )
    return json.loads(header["run"])
