"""Going through a stream of samples batch by batch, from where a checkpoint left it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from guided_dropout.errors import ArtefactError
from guided_dropout.fisher.checkpoint import Checkpoint, Digest, State
from guided_dropout.fisher.stream import Item


class Sums(Protocol):
    """What samples are added to; `accumulate.Accumulator` is one."""

    def add(self, batch: Sequence[Item]) -> None:
        """Add a batch."""

    def check(self) -> None:
        """Make sure that all sums are finite."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, facts) from which `load` goes on."""
        ...

    def load(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Take up what `state` gave."""


class Run:
    """One process's part of an estimate.

    Args:
        sums: what the samples are added to.
        batches: the samples, in the same order whenever the run is made again.
        checkpoint: where the state is written, if anywhere.
        progress: called with the number of samples done, after each batch. What it raises ends the run, after the state
            was written.

    Attributes:
        done: samples that were taken, whether they are in the sums or were left out of them.
        taken: batches of them.
    """

    def __init__(
        self,
        sums: Sums,
        batches: Iterator[list[Item]],
        checkpoint: Checkpoint | None = None,
        progress: Callable[[int], Any] | None = None,
    ):
        self.sums, self.done, self.taken = sums, 0, 0
        self._batches, self._checkpoint, self._progress = batches, checkpoint, progress
        self._digest = Digest()

    def steps(self) -> Iterator[None]:
        """Add batch after batch; yields after each."""
        while (batch := self.add()) is not None:
            self.take(batch)
            yield
        self.sums.check()

    def add(self) -> list[Item] | None:
        """Add the next batch and return it; None where there is none."""
        batch = next(self._batches, None)
        if batch is not None:
            self.sums.add(batch)
        return batch

    def take(self, batch: list[Item]) -> None:
        """Count a batch that was added as done, and write the state where it is time."""
        self._pass(batch)
        if self._checkpoint and self._checkpoint.due():
            self._save(self._checkpoint)
        self._tell()

    def facts(self) -> dict[str, Any]:
        """What stands in the state beside that of the sums."""
        return {}

    def resume(self, state: State) -> None:
        """Go on from `state`: pass over the samples that are in it.

        Raises:
            ArtefactError: the samples are not those that it was made from.
        """
        while self.done < state.done and (batch := next(self._batches, None)) is not None:
            self._pass(batch)
        if (self.done, str(self._digest)) != (state.done, state.digest):
            raise ArtefactError(
                f"the first {self.done:,} samples ({self._digest}) are not the {state.done:,} that the checkpoint was "
                f"made from ({state.digest}); expected the same text and tokenizer as before: give those, or "
                "--no-resume to start afresh"
            )
        self.sums.load(state.tensors, state.facts)
        self._tell()

    def _pass(self, batch: list[Item]) -> None:
        self.done, self.taken = self.done + len(batch), self.taken + 1
        if self._checkpoint:
            self._digest.add(batch)

    def _save(self, checkpoint: Checkpoint) -> None:
        self.sums.check()
        tensors, facts = self.sums.state()
        checkpoint.write(State(tensors, self.done, str(self._digest), {**facts, **self.facts()}))

    def _tell(self) -> None:
        try:
            if self._progress:
                self._progress(self.done)
        except BaseException:
            if self._checkpoint:
                self._save(self._checkpoint)
            raise
