"""Ways to evaluate one point of a plane, each a function that does one point and returns its loss."""

# What is compared with is installed for that alone.
# pyright: reportMissingImports=false

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import numpy as np
import torch

from guided_dropout.landscape.directions import gaussian_direction
from guided_dropout.landscape.losses import Evaluation
from guided_dropout.landscape.record import Record
from guided_dropout.landscape.weights import walking
from guided_dropout.models import load_lm

Point = Callable[[float, float], float]
# Points along an axis where a library must be given a whole plane.
SIDE = 3


class UnavailableError(Exception):
    """A method that cannot run here, and why."""


def _loss(model: Any, evaluation: Evaluation) -> float:
    """The mean loss, with the whole head at each position."""
    with torch.no_grad():
        sums = [
            evaluation.objective.losses(model(**batch.inputs).logits, batch).sum().double()
            for batch in evaluation.batches
        ]
    return torch.stack(sums).sum().item() / evaluation.num_samples


@contextlib.contextmanager
def _needed(library: str) -> Iterator[None]:
    """Within, what cannot be imported is a method that cannot run."""
    try:
        yield
    except Exception as e:
        raise UnavailableError(f"{library} cannot be imported ({e})") from e


@contextlib.contextmanager
def _moved(evaluation: Evaluation, loss: Callable[[], float]) -> Iterator[Point]:
    """At each point the weights are written, both directions moving, before the loss is asked for."""
    directions = [gaussian_direction(evaluation.model, axis=axis) for axis in (0, 1)]
    with walking(evaluation.model, directions) as walker:

        def point(alpha: float, beta: float) -> float:
            walker.move(alpha, beta)
            return loss()

        yield point


@contextlib.contextmanager
def forward(source: str, evaluation: Evaluation, folder: str) -> Iterator[Point]:
    """The yardstick: one plain evaluation forward of the same batches, the whole head, nothing moved."""
    yield lambda alpha, beta: _loss(evaluation.model, evaluation)


@contextlib.contextmanager
def plane(source: str, evaluation: Evaluation, folder: str) -> Iterator[Point]:
    """This project's way: weights written in place, the head at the targets where that is exact, the loss noted."""
    record = Record(1, 1, 2, folder=folder)

    def noted() -> float:
        record.add(0, 0, loss := evaluation())
        return loss

    with _moved(evaluation, noted) as point:
        yield point


@contextlib.contextmanager
def row(source: str, evaluation: Evaluation, folder: str) -> Iterator[Point]:
    """The same along a row: the second direction stands still."""
    with plane(source, evaluation, folder) as whole:
        yield lambda alpha, beta: whole(alpha, 0.25)


@contextlib.contextmanager
def whole_head(source: str, evaluation: Evaluation, folder: str) -> Iterator[Point]:
    """This project's way without the shortcut for the head: what writing the weights costs."""
    with _moved(evaluation, lambda: _loss(evaluation.model, evaluation)) as point:
        yield point


@contextlib.contextmanager
def writing(source: str, evaluation: Evaluation, folder: str) -> Iterator[Point]:
    """Writing the weights of a point alone, both directions moving."""
    with _moved(evaluation, lambda: math.nan) as point:
        yield point


@contextlib.contextmanager
def reloaded(source: str, evaluation: Evaluation, folder: str) -> Iterator[Point]:
    """The published way: the model is loaded anew for each point, moved, and run with its whole head."""
    directions = [gaussian_direction(evaluation.model, axis=axis) for axis in (0, 1)]
    device = next(evaluation.model.parameters()).device

    def point(alpha: float, beta: float) -> float:
        model: Any = load_lm(source).to(device).eval()  # pyright: ignore[reportArgumentType]
        own = dict(model.named_parameters())
        with torch.no_grad():
            for step, direction in zip((alpha, beta), directions, strict=True):
                for name, t in direction.tensors.items():
                    own[name].add_(t.to(device), alpha=step)
        return _loss(model, evaluation)

    yield point


@contextlib.contextmanager
def loss_landscapes(source: str, evaluation: Evaluation, folder: str) -> Iterator[Point]:
    """loss-landscapes: its plane of a few points, divided by their number; per tensor: per filter may divide by 0."""
    with _needed("loss-landscapes"):
        import loss_landscapes as library
        from loss_landscapes.metrics import Metric

    with forward(source, evaluation, folder) as plain:

        class TextLoss(Metric):
            def __call__(self, model_wrapper: Any) -> float:
                return plain(0, 0)

        def point(alpha: float, beta: float) -> float:
            keep = {name: p.detach().clone() for name, p in evaluation.model.named_parameters()}
            found = library.random_plane(
                evaluation.model, TextLoss(), distance=0.5, steps=SIDE, normalization="layer", deepcopy_model=False
            )
            with torch.no_grad():
                for name, p in evaluation.model.named_parameters():
                    p.copy_(keep[name])
            return float(np.asarray(found)[SIDE // 2, SIDE // 2])

        yield point


@contextlib.contextmanager
def landscaper(source: str, evaluation: Evaluation, folder: str) -> Iterator[Point]:
    """Landscaper: its plane of a few points, divided by their number."""
    with _needed("Landscaper"):
        from landscaper import LossLandscape

    with forward(source, evaluation, folder) as plain:

        def point(alpha: float, beta: float) -> float:
            directions = [
                [d.tensors.get(n, torch.zeros_like(p, device="cpu")).to(p.device)
                 for n, p in evaluation.model.named_parameters()]
                for d in (gaussian_direction(evaluation.model, axis=axis) for axis in (0, 1))
            ]  # fmt: skip
            library: Any = LossLandscape
            found = library.compute(
                evaluation.model, [0], directions, lambda model, data: torch.tensor(plain(0, 0)), dim=2, steps=SIDE,
                distance=0.5,
            )  # fmt: skip
            return float(np.asarray(found.loss).ravel()[SIDE * SIDE // 2])

        yield point


# name → (way, points that one call evaluates)
METHODS = {
    "forward": (forward, 1),
    "again": (forward, 1),
    "plane": (plane, 1),
    "row": (row, 1),
    "whole-head": (whole_head, 1),
    "writing": (writing, 1),
    "reloaded": (reloaded, 1),
    "loss-landscapes": (loss_landscapes, SIDE * SIDE),
    "landscaper": (landscaper, SIDE * SIDE),
}
PACKAGES = {"loss-landscapes": "loss-landscapes", "landscaper": "landscaper"}


def version_of(method: str) -> str | None:
    """Of the library behind it."""
    try:
        return metadata.version(PACKAGES[method]) if method in PACKAGES else None
    except metadata.PackageNotFoundError:
        return None
