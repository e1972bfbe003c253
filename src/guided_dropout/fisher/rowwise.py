"""Linear operations that treat each row alike, with a backward of our own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from guided_dropout.fisher.layout import Layout
from guided_dropout.fisher.products import listed_times, times
from guided_dropout.fisher.rules import Call, Rule, as_rows
from guided_dropout.fisher.squares import Use


@dataclass
class RowByRow:
    """An operation whose rows are differentiated by us, so that rows without a gradient cost nothing.

    Attributes:
        call: the operation, of a rule that gives the input's gradient; None once it has been differentiated.
        rule: its rule.
        layout: which rows are whose.
        take: called with the uses in the backward.
    """

    call: Call | None
    rule: Rule
    layout: Layout
    take: Callable[[dict[str, Use]], None]

    def run(self) -> Tensor:
        """The output; its backward never forms a weight's gradient."""
        assert self.call is not None
        return _Function.apply(self.call.x, self)  # pyright: ignore[reportReturnType]

    def backward(self, gradient: Tensor) -> Tensor:
        """The input's gradient from the output's."""
        assert self.call is not None
        assert self.rule.input_gradient is not None
        shape, parameters, rows = self.call.x.shape, self.call.parameters, as_rows(gradient)
        kept = None if self.layout.rows is not None else rows_with_gradient(rows)
        uses = self.rule.uses(self.call, rows, self.layout if kept is None else self.layout.without_zeros(kept))
        self.call = None  # the input goes as soon as it has served
        self.take(uses)
        del uses
        matrix = self.rule.input_gradient(parameters)
        return (times(rows, matrix) if kept is None else listed_times(rows, kept, matrix)).view(shape)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: RowByRow) -> Tensor:
        ctx.kept = kept
        assert kept.call is not None
        kept.call = replace(kept.call, x=x.detach())
        out = kept.rule.run(kept.call)
        # A view that was made in here could not be changed in place, as a model may do with what it gets.
        return torch.ops.aten._unsafe_view(out, out.shape) if out._is_view() else out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        kept, ctx.kept = ctx.kept, None
        return kept.backward(*gradients), None


def rows_with_gradient(rows: Tensor) -> Tensor | None:
    """Numbers of the rows of [R, n] that are not all zero; None where these are most, or where to ask would cost more.

    Padding has none, nor what only idle positions of the last layer depend on. Exact: a row is left out only if each of
    its elements is zero.
    """
    if rows.device.type != "cpu" or not rows.shape[1]:
        return None
    doubtful = (rows[:, 0] == 0).nonzero()[:, 0]
    if len(doubtful) * 8 < len(rows):
        return None
    idle = doubtful[~rows.index_select(0, doubtful).any(1)]
    return rows.new_ones(len(rows), dtype=torch.bool).index_fill_(0, idle, False).nonzero()[:, 0]
