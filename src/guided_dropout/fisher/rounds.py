"""A run that a rule stops: in several processes at the sample at which it stops in one.

The batches are those of a single process, dealt out in turn. In each round every process adds one, all tell each other
their samples' means, and the rule is told them batch by batch, in the stream's order. Once it is settled, what lies
beyond is taken back. So the rule is told the same in all processes, and finds the same.

Each process writes its own state when it is time, so after a kill they may be some rounds apart, or one is lost. The
rule's state stands in each of them: all take up the furthest, and who is behind adds its own batches up to there, of
which the rule is told no more.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from guided_dropout.fisher.accumulate import Accumulator
from guided_dropout.fisher.checkpoint import Checkpoint, State
from guided_dropout.fisher.processes import BATCHES_BETWEEN, Processes
from guided_dropout.fisher.run import Run
from guided_dropout.fisher.site_scores import Means, StoppingRule
from guided_dropout.fisher.stream import Item, Stream

_Array = npt.NDArray[np.float64]


class BatchMeans:
    """Takes down the samples' means, and forgets them once they cannot be taken back.

    Attributes:
        samples: how many it was told.
    """

    def __init__(self, names: Sequence[str]):
        self.samples = 0
        self._names, self._rows = list(names), np.zeros((0, len(names)))

    def add(self, means: Means) -> None:
        """Take down a batch."""
        rows = np.stack([np.asarray(means[name], dtype=np.float64) for name in self._names], axis=1)
        self._rows = np.concatenate([self._rows, rows])
        self.samples += len(rows)

    def state(self) -> dict[str, Any]:
        """Their number; what came before is forgotten."""
        self._rows = self._rows[:0]
        return {"samples": self.samples}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go back to so many."""
        self._rows = self._rows[: max(0, len(self._rows) - (self.samples - state["samples"]))]
        self.samples = state["samples"]

    def since(self, samples: int) -> _Array:
        """[B, T]: those of the samples that came after the first `samples`."""
        return self._rows[len(self._rows) - (self.samples - samples) :]

    def named(self, rows: _Array) -> dict[str, _Array]:
        """For each parameter its column of `rows`."""
        return dict(zip(self._names, rows.T, strict=True))


@dataclass(frozen=True)
class _Told:
    """One process's part of a round.

    Attributes:
        rows: its batch's means, [B, T]; None where the samples have ended.
        skipped: samples without a target that came before the batch is done, in all of the stream.
    """

    rows: _Array | None
    skipped: int


class RankedRun(Run):
    """One process's part of an estimate that a rule ends.

    Args:
        sums: new ones, which tell `means` of each sample.
        batches: those of a single process, from `stream`, the same in all processes.
        means: what `sums` tells.
        rule: says when it is enough; is told the samples of all processes.
        stream: counts the samples without a target.
        world: the processes.
        checkpoint: see `Run`.
        progress: see `Run`.

    Attributes:
        skipped: samples without a target that a single process would have met.

    Raises:
        ModelError: a loss in the first batch is not finite.
    """

    def __init__(
        self,
        sums: Accumulator,
        batches: Iterator[list[Item]],
        means: BatchMeans,
        rule: StoppingRule,
        stream: Stream,
        world: Processes,
        checkpoint: Checkpoint | None = None,
        progress: Callable[[int], Any] | None = None,
    ):
        drawn = ((batch, stream.skipped) for batch in batches)
        read = []
        for batch, skipped in drawn:  # all make their plan on the same samples, so that all find the same noise
            read.append((batch, skipped))
            if sums.rehearse(batch):
                break
        super().__init__(sums, self._dealt(itertools.chain(read, drawn), stream, world), checkpoint, progress)
        self.skipped = 0
        self._sums, self._means, self._rule, self._world = sums, means, rule, world
        self._met = 0  # without a target, when this process's last batch was drawn
        self._told = 0  # batches of all processes that the rule was told of
        self._noise: list[str] = []  # what it leaves out
        self._last: list[Item] | None = None  # added, and not yet counted as done
        self._beyond: list[Item] | None = None  # added, and beyond the stop
        self._loaded: dict[str, Any] | None = None

    def run(self) -> None:
        """Add batches until the rule is settled or there are no more; returns when all processes have.

        Raises:
            ModelError: a loss is not finite, or squares are not.
            ProcessError: another process failed.
        """
        self._align()
        self._world.in_step(self._catch_up())
        # The main process decides: elsewhere the last digit may be another, and all must stop or none.
        settled, ended = self._world.gather(self._rule.settled)[0], False
        while not (settled or ended):
            told = self._world.exchange(self._part)
            batches = [part.rows for part in told if part.rows is not None]
            used, settled = self._world.exchange(partial(self._decide, batches))[0]
            if not self._world.is_main:
                self._tell_rule(batches[:used])
            ended = len(batches) < len(told)
            self.skipped = told[used - 1].skipped if settled else max(part.skipped for part in told)
            self._told += used
            if self._world.index >= used:
                self._beyond, self._last = self._last, None
        with self._world.together():
            if self._beyond is not None:
                self._sums.take_back(self._beyond)
            self._count_last()
            self._sums.check()

    def resume(self, state: State) -> None:
        """Go on from `state`; see `Run.resume`."""
        self._loaded = state.facts["ranking"]
        super().resume(state)

    def facts(self) -> dict[str, Any]:
        """How far the rule is; until the processes have agreed on that, as the state left it."""
        here = {"told": self._told, "skipped": self.skipped, "noise": self._noise, "rule": self._rule.state()}
        return {"ranking": self._loaded or here}

    def _dealt(self, drawn: Iterator[tuple[list[Item], int]], stream: Stream, world: Processes) -> Iterator[list[Item]]:
        """This process's share of the batches."""
        for batch, self._met in itertools.islice(drawn, world.index, None, world.count):
            yield batch
        self._met = stream.skipped

    def _align(self) -> None:
        """Take up the furthest state of the rule."""
        found = self._world.gather(self._loaded)
        furthest = max((one for one in found if one), key=lambda one: one["told"], default=None)
        self._noise = list(furthest["noise"]) if furthest else sorted(self._sums.noise)
        self._sums.noise = set(self._noise)
        self._rule.exclude(self._noise)
        if furthest:
            self._told, self.skipped = furthest["told"], furthest["skipped"]
            self._rule.load_state(furthest["rule"])
        self._loaded = None

    def _catch_up(self) -> Iterator[None]:
        """Add what the rule was told of, and this process's state does not hold."""
        world = self._world
        while self.taken * world.count + world.index < self._told and (batch := self.add()) is not None:
            self.take(batch)
            yield

    def _part(self) -> _Told:
        """This process's part of a round."""
        self._count_last()
        if self._world.count > 1 and self.taken % BATCHES_BETWEEN == 0:
            self._sums.check()  # what is taken back costs the batches since then
        before = self._means.samples
        self._last = self.add()
        return _Told(None if self._last is None else self._means.since(before), self._met)

    def _decide(self, batches: Sequence[_Array]) -> tuple[int, bool]:
        """Tells the main process's rule until it is settled; returns of how many batches, and whether it is."""
        if self._world.is_main:
            for number in range(len(batches)):
                self._tell_rule(batches[number : number + 1])
                if self._rule.settled:
                    return number + 1, True
        return len(batches), False

    def _tell_rule(self, batches: Sequence[_Array]) -> None:
        for rows in batches:
            if len(rows):  # none where no sample of the batch is finite
                self._rule.add(self._means.named(rows))

    def _count_last(self) -> None:
        batch, self._last = self._last, None
        if batch is not None:
            self.take(batch)
