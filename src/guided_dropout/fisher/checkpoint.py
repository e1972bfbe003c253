"""The partial state of an estimate on disk, from which it goes on as if it had never stopped."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from guided_dropout.artefacts import read_tensors, write_tensors
from guided_dropout.errors import DataError
from guided_dropout.fisher.selection import MEASURED
from guided_dropout.fisher.stream import Item
from guided_dropout.unfinished import RunFiles

FILES = RunFiles("fisher-checkpoint", 3, "checkpoint", "process-{}-of-{}.safetensors")
# Elements of each parameter that go into the fingerprint of the weights.
_SAMPLED = 256


@dataclass(frozen=True)
class State:
    """What was done so far.

    Attributes:
        tensors: the running sums.
        done: samples taken from the stream, in its order of batches.
        digest: of these samples.
        facts: whatever else has to be taken up again, as JSON.
    """

    tensors: Mapping[str, Tensor]
    done: int
    digest: str
    facts: Mapping[str, Any]


class Checkpoint:
    """One process's file.

    Args:
        folder: where the files of all processes lie.
        run: what makes a run what it is; a file of another run is refused.
        every: seconds between two writes; 0 is after each batch.
        process: this process's number, from 0.
        processes: how many there are.

    Raises:
        DataError: a time below 0.
    """

    def __init__(
        self, folder: str | Path, run: Mapping[str, Any], *, every: float, process: int = 0, processes: int = 1
    ):
        if not every >= 0:  # NaN too
            raise DataError(f"checkpoint every {every:g} seconds; expected 0 (after each batch) or more")
        self.folder, self.run, self.every = Path(folder), json.loads(json.dumps(run)), every
        self.path = FILES.file(folder, process, processes)
        self._last = time.monotonic()
        for stale in self.folder.glob(f".{self.path.name}.*"):  # a kill while it was written
            stale.unlink(missing_ok=True)

    def due(self) -> bool:
        """Whether it is time to write."""
        return time.monotonic() - self._last >= self.every

    def write(self, state: State) -> None:
        """Replace the file, all or nothing.

        Raises:
            ArtefactError: it cannot be written.
        """
        facts = {"run": self.run, "done": state.done, "digest": state.digest, "facts": dict(state.facts)}
        write_tensors(self.path, state.tensors, FILES.header(facts))
        self._last = time.monotonic()

    def read(self) -> State | None:
        """The state in the file; None where there is none yet.

        Raises:
            ArtefactError: the file is damaged, or of another run; what differs is told from both sides.
        """
        for file in FILES.there(self.folder):
            FILES.check_run(file, self.run)
        if not self.path.exists():
            return None
        header = FILES.facts(self.path)
        return State(read_tensors(self.path), header["done"], header["digest"], header["facts"])


def holds_state(folder: str | Path) -> bool:
    """Whether the state of an unfinished run lies in `folder`."""
    return bool(FILES.there(folder))


def check_unused(folder: str | Path) -> None:
    """Refuse to begin a new run where the state of another lies: hours of work may be in it.

    Raises:
        ArtefactError: there is one.
    """
    FILES.check_unused(folder, lambda file: FILES.facts(file)["done"], "samples")


def remove_checkpoint(folder: str | Path) -> None:
    """Remove the state of a run, and the folder if nothing else is in it."""
    FILES.remove(folder)


class Digest:
    """Of samples in their order: shows that a stream is the one that it was."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, items: Sequence[Item]) -> None:
        """Take in further samples."""
        for item in items:
            self._hash.update(f"\n{item.index}".encode())
            for name in sorted(item.sample):
                values = torch.as_tensor(item.sample[name]).cpu()
                values = values.double() if values.is_floating_point() else values.long()
                self._hash.update(f" {name} {list(values.shape)} ".encode())
                self._hash.update(values.numpy().tobytes())

    def __str__(self) -> str:
        return self._hash.hexdigest()


def fingerprint(tensors: Mapping[str, Tensor], measured: Iterable[str] = ()) -> str:
    """Of a model's weights: names, shapes, types and a few hundred elements of each; and of which are measured."""
    digest = hashlib.blake2b("\n".join(measured).encode(), digest_size=16)
    for name, tensor in tensors.items():
        digest.update(f"\n{name} {list(tensor.shape)} {tensor.dtype} ".encode())
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // _SAMPLED)].cpu()
        some = some.double() if some.dtype in MEASURED else some.contiguous().view(torch.uint8)  # quantised
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()


def weights_fingerprint(model: nn.Module, measured: Iterable[str]) -> str:
    """Of all that a model is saved with, buffers too, and of the names of those parameters that are measured.

    The others are in the gradients as well: under an adapter, the whole base model, which may be quantised buffers.
    """
    return fingerprint({n: t for n, t in model.state_dict().items() if isinstance(t, Tensor)}, measured)
