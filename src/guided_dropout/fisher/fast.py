"""Squares of the per-sample gradients of a whole batch, from one forward and one backward.

Where a rule covers an operation on a parameter, its input and its output's gradient are captured; the weights require
no gradient, so autograd never forms a weight gradient of the batch. Parameters that meet an operation without a rule
are left to the reference loop, for that batch.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from guided_dropout.fisher.crossentropy import cross_entropy
from guided_dropout.fisher.layout import Layout
from guided_dropout.fisher.operations import Key, ParameterOperations
from guided_dropout.fisher.reference import sum_of_squares
from guided_dropout.fisher.rules import Call, Rule, as_rows
from guided_dropout.fisher.squares import Use, add_squares
from guided_dropout.fisher.totals import Totals
from guided_dropout.objectives import IGNORE, Batch, Objective, Sample


@dataclass(frozen=True)
class Plan:
    """What running the model has shown about it.

    Attributes:
        layouts: key → ``"batch"`` (the first dimension is the sample), ``"flat"`` (rows, sample after sample),
            ``"shared"`` (an embedding looked up once for the whole batch; it is looked up per sample instead) or
            ``"head"`` (target positions only).
        head: the module that maps hidden states to the vocabulary, if it can be run at target positions only.
        fallback: parameters that always take the reference loop.
        noise: parameters whose true gradient is zero; what is measured of them is rounding.
    """

    layouts: Mapping[Key, str]
    head: nn.Module | None
    fallback: frozenset[str] = frozenset()
    noise: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Added:
    """What one batch was.

    Attributes:
        losses: [B], one per sample. Where any of them is not finite, nothing was added.
        tensor_sums: name → [B] float64, each sample's sum of squares over the parameter's elements; None unless asked.
    """

    losses: Tensor
    tensor_sums: dict[str, Tensor] | None = None


class BatchedSquares:
    """Adds up the squares of the per-sample gradients, batch by batch.

    Args:
        scores_only: keep only each parameter's sum over its elements, with no memory of the parameters' size.
        per_sample: give each sample's sums with each batch.

    Attributes:
        totals: the running sums.
        fallback: parameters that took the reference loop in any batch.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        parameters: Mapping[str, nn.Parameter],
        plan: Plan,
        *,
        scores_only: bool = False,
        per_sample: bool = False,
    ):
        self.model, self.objective, self.parameters, self.plan = model, objective, parameters, plan
        self.totals = Totals(parameters, scores_only=scores_only)
        self.per_sample = per_sample
        self.fallback: set[str] = set()

    def add(self, samples: Sequence[Sample]) -> Added:
        """Add a batch of samples."""
        batch = self.objective.collate(self.model, samples)
        capture = Capture(self, batch)
        losses = capture.run()
        if not losses.isfinite().all():
            return Added(losses)
        skipped = capture.mode.uncovered | self.plan.fallback
        self.fallback |= skipped
        if skipped:
            self._add_by_reference(skipped, samples, capture.sums)
        if self.totals.scores_only:
            for name, sums in capture.sums.items():
                self.totals[name].add_(sums.sum())
        self.totals.counted(len(samples))
        return Added(losses, capture.sums if self.per_sample else None)

    def _add_by_reference(
        self, names: set[str] | frozenset[str], samples: Sequence[Sample], sums: dict[str, Tensor]
    ) -> None:
        some = {n: self.parameters[n] for n in self.parameters if n in names}
        with requiring_grad(some.values()):
            for b, sample in enumerate(samples):
                for name, squares in sum_of_squares(self.model, some, [sample], self.objective).items():
                    if not self.totals.scores_only:
                        self.totals[name].add_(squares)
                    if name in sums:
                        sums[name][b] = squares.sum(dtype=torch.float64)


class Capture:
    """One batch's forward and backward.

    Attributes:
        sums: name → [B] float64, each sample's sum of squares over the parameter's elements, where that is wanted.
    """

    def __init__(self, owner: BatchedSquares, batch: Batch):
        self.owner, self.batch, self.plan = owner, batch, owner.plan
        self.targets = batch.targets != IGNORE
        self.uses: defaultdict[str, list[Use]] = defaultdict(list)
        self.expected: Counter[str] = Counter()
        self.mode = ParameterOperations({id(p): n for n, p in owner.parameters.items()}, self.visit)
        self.head_rows: Layout | None = None
        self.sums: dict[str, Tensor] = {}
        if owner.per_sample or owner.totals.scores_only:
            zeros = {
                n: torch.zeros(len(batch), dtype=torch.float64, device=p.device) for n, p in owner.parameters.items()
            }
            self.sums.update(zeros)

    def run(self) -> Tensor:
        """Forward and, where all losses are finite, backward; returns the losses [B]."""
        logits = self.forward()
        if self.plan.head is None:
            logits = logits[self.targets]
        weights = self.batch.weights[self.targets]
        ce = cross_entropy(logits, self.batch.targets[self.targets])
        del logits  # its memory becomes the gradient's
        losses = self.target_layout().sum_rows(ce.detach() * weights)
        if not losses.isfinite().all():
            return losses
        if ce.requires_grad:
            (ce * weights.to(ce.dtype)).sum().backward()
        for name, uses in self.uses.items():
            if name not in self.mode.uncovered:
                self._square(name, uses)
        return losses

    def forward(self) -> Tensor:
        """The logits [B, T, V], or [M, V] where the head sees target positions only."""
        with self.mode, head_at(self.plan.head, self.targets, self._entered_head):
            return self.owner.model(**self.batch.inputs).logits

    def target_layout(self) -> Layout:
        """Which of the M target rows are whose."""
        return Layout((0, *self.targets.sum(1).cumsum(0).tolist()))

    def _entered_head(self, inside: bool) -> None:
        self.head_rows = self.target_layout() if inside else None

    def visit(self, rule: Rule, call: Call, keys: dict[str, Key]) -> Tensor | None:
        """Run one operation and capture what its parameters need."""
        names = {name for name, _ in keys.values()}
        layout_kind = self.plan.layouts.get(next(iter(keys.values())))
        call, layout = self._arrange(call, layout_kind)
        if layout is None:
            self.mode.uncovered |= names
            return rule.run(call)
        self.expected.update(names)
        if rule.input_gradient is not None and call.x.requires_grad:
            return _Alone.apply(call.x, _Kept(call, rule, layout, keys, self))
        out = rule.run(call)
        if not out.requires_grad:  # the graph begins here; a clone, since a leaf must not be changed in place
            out = out.detach().requires_grad_().clone()
        kept = [replace(call, x=call.x.detach())]

        def hook(gradient: Tensor) -> None:
            saved = kept.pop()  # free the input as soon as it has served
            self.take(rule.uses(saved, as_rows(gradient), layout), keys)

        out.register_hook(hook)
        return out

    def _arrange(self, call: Call, kind: str | None) -> tuple[Call, Layout | None]:
        """Rows and their owners for an operation of this kind, or None where this batch does not have its form."""
        x, samples = call.x, len(self.batch)
        is_lookup = not x.is_floating_point()
        rows = x.numel() if is_lookup else x.numel() // max(1, x.shape[-1])
        if kind == "head":
            return call, self.head_rows
        if kind == "shared":
            x = x.expand(samples, *x.shape[-1:] if x.dim() == 1 else x.shape[1:])
            return replace(call, x=x), Layout.even(x.numel(), samples)
        if (kind == "batch" and x.shape[0] == samples) or (kind == "flat" and rows % samples == 0):
            return call, Layout.even(rows, samples)
        return call, None

    def take(self, uses: Mapping[str, Use], keys: Mapping[str, Key]) -> None:
        """Square an operation's uses, or keep those of parameters that are used again."""
        for role, use in uses.items():
            name = keys[role][0] if role in keys else None
            if name is None or name in self.mode.uncovered or name in self.plan.fallback:
                continue
            if self.expected[name] == 1:
                self._square(name, [use])
            else:
                self.uses[name].append(use)

    def _square(self, name: str, uses: Sequence[Use]) -> None:
        totals = self.owner.totals
        add_squares(None if totals.scores_only else totals[name], uses, self.sums.get(name))


@dataclass
class _Kept:
    """What the backward of an operation that treats each row alike needs."""

    call: Call
    rule: Rule
    layout: Layout
    keys: Mapping[str, Key]
    capture: Capture

    def backward(self, gradient: Tensor) -> Tensor:
        call, rule, layout = self.call, self.rule, self.layout
        assert rule.input_gradient is not None
        rows = as_rows(gradient)
        kept = None if layout.rows is not None else rows_with_gradient(rows)
        if kept is None:
            self.capture.take(rule.uses(call, rows, layout), self.keys)
            return rule.input_gradient(call, rows).view(call.x.shape)
        self.capture.take(rule.uses(call, rows, layout.only(kept)), self.keys)
        whole = rows.new_zeros(len(rows), call.x.shape[-1])
        return whole.index_copy_(0, kept, rule.input_gradient(call, rows[kept])).view(call.x.shape)


class _Alone(torch.autograd.Function):
    """An operation whose rows are differentiated by us; it never forms a weight's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: _Kept) -> Tensor:
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


@contextlib.contextmanager
def head_at(
    head: nn.Module | None, targets: Tensor, entered: Callable[[bool], None] = lambda inside: None
) -> Iterator[None]:
    """Within, `head` sees only the rows where `targets` [B, T] is true, and gives logits [M, V] for them."""
    if head is None:
        yield
        return

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        entered(True)
        return (args[0][targets], *args[1:])

    def after(*_: Any) -> None:
        entered(False)

    handles = [head.register_forward_pre_hook(before), head.register_forward_hook(after)]
    try:
        yield
    finally:
        for h in handles:
            h.remove()


@contextlib.contextmanager
def requiring_grad(parameters: Any) -> Iterator[None]:
    """Within, `parameters` require gradients; after, they do not."""
    parameters = list(parameters)
    for p in parameters:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(False)
