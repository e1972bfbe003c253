"""Which points are done, on disk: a run that was killed goes on with the point that was missing.

Any number of processes may go on where others stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guided_dropout.artefacts import read_tensors, write_tensors
from guided_dropout.unfinished import RunFiles

FILES = RunFiles("landscape-checkpoint", 1, "run", "points-{}-of-{}.safetensors")
DIRECTIONS_NAME = "direction-{}.safetensors"
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
        self._file = None if folder is None else FILES.file(folder, process, processes)
        self._written, self._dirty = time.monotonic(), False

    def read(self) -> None:
        """Take up what the files in the folder hold, those of all processes.

        Raises:
            ArtefactError: one is damaged or of another run; what differs is told from both sides.
        """
        for file in FILES.there(self.folder) if self.folder else ():
            FILES.check_run(file, self._run)
            self.take_up(read_tensors(file))

    def take_up(self, there: Mapping[str, Tensor]) -> None:
        """Add what another record's `tensors` hold; where both have a point, the other's loss counts."""
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
        if self._file is None or not self._dirty:
            return
        write_tensors(self._file, self.tensors(), FILES.header({"run": self._run}))
        self._written, self._dirty = time.monotonic(), False

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name."""
        return {"losses": self.losses, "done": self.done, "lengths": self.lengths, "moved": self.moved}


def holds_points(folder: str | Path) -> bool:
    """Whether points of an unfinished run lie in `folder`."""
    return bool(FILES.there(folder))


def check_unused(folder: str | Path) -> None:
    """Refuse to begin a new run where points of another lie: hours of work may be in them.

    Raises:
        ArtefactError: there are some.
    """
    FILES.check_unused(folder, lambda file: int(read_tensors(file)["done"].sum()), "points")


def remove_record(folder: str | Path) -> None:
    """Remove the points of a run, and the folder if nothing else is in it."""
    FILES.remove(folder, DIRECTIONS_NAME.format("*"))
