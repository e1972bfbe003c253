r"""Moving a model's weights along directions in place, and putting them back bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from guided_dropout.landscape.directions import Direction, movable_parameters, step_dtype


class Walker:
    r"""A model whose parameters stand at :math:`\theta^* + \beta\eta + \alpha\delta`.

    Each point is written from the stored originals, never from the point before, so that no rounding builds up and the
    order of the points does not matter. A step is one pass over the weights: :math:`\theta^* + \beta\eta` is kept along
    a row. Steps from float16 and bfloat16 weights are computed in float32 and rounded once.

    Args:
        model: whose weights are written.
        directions: one or two.
    """

    def __init__(self, model: nn.Module, directions: Sequence[Direction]):
        parameters = movable_parameters(model)
        first, *others = directions
        names = dict.fromkeys(name for d in directions for name in d.tensors)
        self._parameters = {name: parameters[name].data for name in names}  # .data: no trace in autograd's counters
        self._originals = {name: p.clone() for name, p in self._parameters.items()}
        self._along = {n: _step(t, self._parameters[n]) for n, t in first.tensors.items()}
        self._across: dict[str, Tensor] = {}
        if others:
            self._across = {n: _step(t, self._parameters[n]) for n, t in others[0].tensors.items()}
        self._row: dict[str, Tensor] = {}
        self._beta: float | None = None

    @torch.no_grad()
    def move(self, alpha: float, beta: float = 0.0) -> None:
        """Write the weights of one point."""
        if beta != self._beta:
            self._begin_row(beta)
        for name, p in self._parameters.items():
            origin, step = self._row.get(name, self._originals[name]), self._along.get(name)
            if step is None:
                p.copy_(origin)
            elif p.dtype == origin.dtype == step.dtype:
                torch.add(origin, step, alpha=alpha, out=p)
            else:
                p.copy_(torch.add(origin.to(step.dtype), step, alpha=alpha))

    @torch.no_grad()
    def restore(self) -> None:
        """Put the originals back."""
        for name, p in self._parameters.items():
            p.copy_(self._originals[name])

    def _begin_row(self, beta: float) -> None:
        for name, step in self._across.items():
            origin = self._originals[name]
            if name not in self._row:
                self._row[name] = torch.empty_like(origin, dtype=step_dtype(origin))
            torch.add(origin.to(step_dtype(origin)), step, alpha=beta, out=self._row[name])
        self._beta = beta


def _step(step: Tensor, parameter: Tensor) -> Tensor:
    return step.to(parameter.device, step_dtype(parameter))


@contextlib.contextmanager
def walking(model: nn.Module, directions: Sequence[Direction]) -> Iterator[Walker]:
    """A `Walker` whose weights are the model's own again afterwards, whatever happens within."""
    walker = Walker(model, directions)
    try:
        yield walker
    finally:
        walker.restore()
