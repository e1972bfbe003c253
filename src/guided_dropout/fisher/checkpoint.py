"""The partial state of an estimate on disk, from which it goes on as if it had never stopped.

One safetensors file per process holds everything, the facts as JSON in its header, so that no kill can leave tensors of
one moment with facts of another.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from guided_dropout.artefacts import read_tensors, write_tensors
from guided_dropout.errors import ArtefactError
from guided_dropout.fisher.stream import Item

KIND = "fisher-checkpoint"
SCHEMA = 1
_NAME = "process-{}-of-{}.safetensors"
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
        every: seconds between two writes.
        process: this process's number, from 0.
        processes: how many there are.
    """

    def __init__(
        self, folder: str | Path, run: Mapping[str, Any], *, every: float, process: int = 0, processes: int = 1
    ):
        self.folder, self.run, self.every = Path(folder), json.loads(json.dumps(run)), every
        self.path = self.folder / _NAME.format(process + 1, processes)
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
        header = {"format": "pt", "kind": KIND, "schema": str(SCHEMA), "checkpoint": json.dumps(facts)}
        write_tensors(self.path, state.tensors, metadata=header)
        self._last = time.monotonic()

    def read(self) -> State | None:
        """The state in the file; None where there is none yet.

        Raises:
            ArtefactError: the file is damaged, or of another run; what differs is told from both sides.
        """
        for path in _files(self.folder):
            odd = differences(_header(path)["run"], self.run)
            if odd:
                raise ArtefactError(
                    f"{path} is of another run: {odd}; expected the same run to resume: give the arguments as they "
                    "were, or --no-resume to start afresh"
                )
        if not self.path.exists():
            return None
        header = _header(self.path)
        return State(read_tensors(self.path), header["done"], header["digest"], header["facts"])


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What differs between two runs, both sides of it: ``seed was 1, is 2; …``; empty where nothing does."""
    a, b = dict(_flat(there)), dict(_flat(here))
    odd = [key for key in {**b, **a} if key not in a or key not in b or a[key] != b[key]]
    return "; ".join(f"{key} was {_shown(a, key)}, is {_shown(b, key)}" for key in odd)


def holds_state(folder: str | Path) -> bool:
    """Whether the state of an unfinished run lies in `folder`."""
    return bool(_files(Path(folder)))


def check_unused(folder: str | Path) -> None:
    """Refuse to begin a new run where the state of another lies: hours of work may be in it.

    Raises:
        ArtefactError: there is one.
    """
    files = _files(Path(folder))
    if files:
        done = sum(_header(path)["done"] for path in files)
        raise ArtefactError(
            f"{folder} holds the state of an unfinished run ({done:,} samples); expected to be told what to do with "
            "it: --resume to go on from there, --no-resume to start afresh"
        )


def remove_checkpoint(folder: str | Path) -> None:
    """Remove the state of a run, and the folder if nothing else is in it."""
    folder = Path(folder)
    for path in [*_files(folder), *folder.glob(f".{_NAME.format('*', '*')}.*")]:
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


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


def fingerprint(parameters: Mapping[str, Tensor]) -> str:
    """Of a model's weights: names, shapes, types and a few hundred elements of each."""
    digest = hashlib.blake2b(digest_size=16)
    for name, p in parameters.items():
        digest.update(f"\n{name} {list(p.shape)} {p.dtype} ".encode())
        flat = p.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // _SAMPLED)].to("cpu", torch.float64)
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob(_NAME.format("*", "*")))


def _header(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, "pt") as f:
            header = f.metadata() or {}
    except (OSError, SafetensorError) as e:
        raise ArtefactError(f"{path} is not a whole checkpoint ({e}); start afresh with --no-resume") from e
    found = (header.get("kind"), header.get("schema"))
    if found != (KIND, str(SCHEMA)):
        raise ArtefactError(
            f"{path} holds {found[0]!r}, version {found[1]}; this version of guided-dropout reads {KIND!r}, version "
            f"{SCHEMA}: start afresh with --no-resume"
        )
    return json.loads(header["checkpoint"])


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shown(facts: Mapping[str, Any], key: str) -> str:
    return json.dumps(facts[key]) if key in facts else "not given"
