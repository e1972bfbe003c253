"""Going from point to point: what is missing, shared out, evaluated and noted."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from guided_dropout.errors import ModelError
from guided_dropout.fisher.processes import Processes
from guided_dropout.landscape.directions import Direction
from guided_dropout.landscape.losses import Evaluation
from guided_dropout.landscape.record import Record
from guided_dropout.landscape.weights import walking
from guided_dropout.undisturbed import evaluating

Ray = Callable[[], Sequence[Direction]]


def walk(
    evaluation: Evaluation,
    rays: Sequence[Ray],
    points: npt.NDArray[np.float64],
    record: Record,
    *,
    world: Processes | None = None,
    progress: Callable[[int, int], Any] | None = None,
) -> Record:
    """Evaluate all points of all rays that `record` lacks; the model comes back as it was.

    Args:
        evaluation: of the model.
        rays: each makes its one or two directions when they are needed.
        points: [P, dims] coordinates along them.
        record: what is done already; it is added to. Processes need not see each other's files: what one of them has
            is missing in none.
        world: the processes that share what is missing, each a part of its own in one piece, so that few directions
            are made twice.
        progress: called with the points done and the points to do, both of this process. What it raises ends the walk,
            after what is done was written.

    Returns:
        `record` with the points of all processes.

    Raises:
        ModelError: the loss at the weights as they are is no finite number, which is looked at first.
        ProcessError: another process failed.
    """
    world = world or Processes()
    _share(record, world)
    missing = (~record.done).flatten().nonzero().flatten().tolist()
    bounds = [len(missing) * i // world.count for i in range(world.count + 1)]
    own = missing[bounds[world.index] : bounds[world.index + 1]]
    steps = _steps(evaluation, rays, points, record, own, progress)
    with contextlib.closing(steps):
        world.in_step(steps)
    _share(record, world)
    if not record.done.all():
        raise AssertionError(f"{int((~record.done).sum())} points of {record.done.numel()} have no loss after the walk")
    return record


def _steps(
    evaluation: Evaluation,
    rays: Sequence[Ray],
    points: npt.NDArray[np.float64],
    record: Record,
    own: Sequence[int],
    progress: Callable[[int, int], Any] | None,
) -> Generator[None]:
    done = 0
    try:
        with evaluating(evaluation.model):
            for ray, numbers in itertools.groupby(own, key=lambda number: number // len(points)):
                directions = rays[ray]()
                record.begin(ray, [d.norm for d in directions], max(d.num_moved for d in directions))
                with walking(evaluation.model, directions) as walker:
                    for number in sorted(numbers, key=lambda n: points[n % len(points)].any()):  # the origin first
                        point = number % len(points)
                        walker.move(*points[point].tolist())
                        loss = evaluation()
                        if not (math.isfinite(loss) or points[point].any()):
                            raise ModelError(
                                f"the loss of {evaluation.num_samples} samples at the model's own weights is {loss}; "
                                "expected a finite number: `guided-dropout fisher` names the sample or the weights"
                            )
                        record.add(ray, point, loss)
                        done += 1
                        if progress:
                            progress(done, len(own))
                        yield
    finally:
        record.write()


def _share(record: Record, world: Processes) -> None:
    """Give each process what any of them has; of a point that several have, the last one's loss counts in all."""
    for there in world.gather(record.tensors()):
        record.take_up(there)
