"""Going through a stream of samples batch by batch, from where a checkpoint left it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from guided_dropout.errors import ArtefactError
from guided_dropout.fisher.accumulate import Accumulator
from guided_dropout.fisher.checkpoint import Checkpoint, Digest, State
from guided_dropout.fisher.stream import Item


class Run:
    """One process's part of an estimate.

    Args:
        sums: what the samples are added to.
        batches: the samples, in the same order whenever the run is made again.
        checkpoint: where the state is written, if anywhere.
        progress: called with the number of samples done, after each batch. What it raises ends the run, after the state
            was written.
    """

    def __init__(
        self,
        sums: Accumulator,
        batches: Iterator[list[Item]],
        checkpoint: Checkpoint | None = None,
        progress: Callable[[int], Any] | None = None,
    ):
        self.sums, self.done = sums, 0
        self._batches, self._checkpoint, self._progress = batches, checkpoint, progress
        self._digest = Digest()

    def prepare(self) -> None:
        """Make the plan on the first batch that will do, and add nothing yet.

        Raises:
            ModelError: a loss is not finite.
        """
        read = []
        for batch in self._batches:
            read.append(batch)
            if self.sums.prepare(batch):
                break
        self._batches = itertools.chain(read, self._batches)

    def steps(self) -> Iterator[None]:
        """Add batch after batch; yields after each."""
        for batch in self._batches:
            self.sums.add(batch)
            self._take(batch)
            if self._checkpoint and self._checkpoint.due():
                self._save(self._checkpoint)
            self._tell()
            yield

    def resume(self, state: State) -> None:
        """Go on from `state`: pass over the samples that are in it.

        Raises:
            ArtefactError: the samples are not those that it was made from.
        """
        while self.done < state.done and (batch := next(self._batches, None)) is not None:
            self._take(batch)
        if (self.done, str(self._digest)) != (state.done, state.digest):
            raise ArtefactError(
                f"the first {self.done:,} samples ({self._digest}) are not the {state.done:,} that the checkpoint was "
                f"made from ({state.digest}); expected the same text and tokenizer as before: give those, or "
                "--no-resume to start afresh"
            )
        self.sums.load(state.tensors, state.facts)
        self._tell()

    def _take(self, batch: list[Item]) -> None:
        self.done += len(batch)
        if self._checkpoint:
            self._digest.add(batch)

    def _save(self, checkpoint: Checkpoint) -> None:
        self.sums.check()
        tensors, facts = self.sums.state()
        checkpoint.write(State(tensors, self.done, str(self._digest), facts))

    def _tell(self) -> None:
        try:
            if self._progress:
                self._progress(self.done)
        except BaseException:
            if self._checkpoint:
                self._save(self._checkpoint)
            raise
