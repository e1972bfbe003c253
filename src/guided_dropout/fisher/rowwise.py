"""Linear operations that treat each row alike, with a backward of our own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from guided_dropout.fisher.layout import Layout
from guided_dropout.fisher.rules import Call, Rule, as_rows
from guided_dropout.fisher.squares import Use


@dataclass
class RowByRow:
    """An operation whose rows are differentiated by us, so that rows without a gradient cost nothing.

    Attributes:
        call: the operation, of a rule that gives the input's gradient.
        rule: its rule.
        layout: which rows are whose.
        take: called with the uses in the backward.
    """

    call: Call
    rule: Rule
    layout: Layout
    take: Callable[[dict[str, Use]], None]

    def run(self) -> Tensor:
        """The output; its backward never forms a weight's gradient."""
        return _Function.apply(self.call.x, self)  # pyright: ignore[reportReturnType]

    def backward(self, gradient: Tensor) -> Tensor:
        """The input's gradient from the output's."""
        call, rule, layout = self.call, self.rule, self.layout
        assert rule.input_gradient is not None
        rows = as_rows(gradient)
        kept = None if layout.rows is not None else rows_with_gradient(rows)
        if kept is None:
            self.take(rule.uses(call, rows, layout))
            return rule.input_gradient(call, rows).view(call.x.shape)
        self.take(rule.uses(call, rows, layout.only(kept)))
        whole = rows.new_zeros(len(rows), call.x.shape[-1])
        return whole.index_copy_(0, kept, rule.input_gradient(call, rows[kept])).view(call.x.shape)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: RowByRow) -> Tensor:
        ctx.kept = kept
        kept.call = replace(kept.call, x=x.detach())
        return kept.rule.run(kept.call)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        kept, ctx.kept = ctx.kept, None  # free the input as soon as it has served
        return kept.backward(*gradients), None


def rows_with_gradient(rows: Tensor) -> Tensor | None:
    """Numbers of the rows of [R, n] that are not all zero; None where these are most, or where to ask would cost more.

    Padding has none, nor what only idle positions of the last layer depend on. Exact: a row is left out only if each of
    its elements is zero.
    """
    if rows.device.type != "cpu":
        return None
    doubtful = (rows[:, 0] == 0).nonzero()[:, 0]
    if len(doubtful) * 8 < len(rows):
        return None
    idle = doubtful[~rows[doubtful].any(1)]
    return torch.ones(len(rows), dtype=torch.bool).index_fill_(0, idle, False).nonzero()[:, 0]
