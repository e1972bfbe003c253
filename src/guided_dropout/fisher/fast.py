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

from torch import Tensor, nn

from guided_dropout.fisher.operations import Key, ParameterOperations
from guided_dropout.fisher.reference import sum_of_squares
from guided_dropout.fisher.rules import Call, Rule, as_rows
from guided_dropout.fisher.squares import Layout, Use, add_squares
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
    """

    layouts: Mapping[Key, str]
    head: nn.Module | None
    fallback: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Added:
    """What one batch was.

    Attributes:
        losses: [B], one per sample.
        tensor_sums: name → [B] float64, each sample's sum of squares over the parameter's elements; None unless asked.
    """

    losses: Tensor
    tensor_sums: dict[str, Tensor] | None = None


class BatchedSquares:
    """Adds up the squares of the per-sample gradients, batch by batch.

    Attributes:
        totals: the running sums.
        fallback: parameters that took the reference loop in any batch.
    """

    def __init__(self, model: nn.Module, objective: Objective, parameters: Mapping[str, nn.Parameter], plan: Plan):
        self.model, self.objective, self.parameters, self.plan = model, objective, parameters, plan
        self.totals = Totals(parameters)
        self.fallback: set[str] = set()

    def add(self, samples: Sequence[Sample]) -> Added:
        """Add a batch of samples."""
        batch = self.objective.collate(self.model, samples)
        capture = Capture(self, batch)
        losses = capture.run()
        skipped = capture.mode.uncovered | self.plan.fallback
        self.fallback |= skipped
        if skipped:
            self._add_by_reference(skipped, samples)
        self.totals.counted(len(samples))
        return Added(losses)

    def _add_by_reference(self, names: set[str] | frozenset[str], samples: Sequence[Sample]) -> None:
        some = {n: self.parameters[n] for n in self.parameters if n in names}
        with requiring_grad(some.values()):
            for name, squares in sum_of_squares(self.model, some, samples, self.objective).items():
                self.totals[name].add_(squares)


class Capture:
    """One batch's forward and backward."""

    def __init__(self, owner: BatchedSquares, batch: Batch):
        self.owner, self.batch, self.plan = owner, batch, owner.plan
        self.targets = batch.targets != IGNORE
        self.uses: defaultdict[str, list[Use]] = defaultdict(list)
        self.expected: Counter[str] = Counter()
        self.mode = ParameterOperations({id(p): n for n, p in owner.parameters.items()}, self.visit)
        self.head_rows: Layout | None = None

    def run(self) -> Tensor:
        """Forward and backward; returns the losses [B]."""
        logits = self.forward()
        targets, weights = self.batch.targets[self.targets], self.batch.weights[self.targets]
        if self.plan.head is None:
            logits = logits[self.targets]
        ce = nn.functional.cross_entropy(logits, targets, reduction="none") * weights.to(logits.dtype)
        if ce.requires_grad:
            ce.sum().backward()
        for name, uses in self.uses.items():
            if name not in self.mode.uncovered:
                add_squares(self.owner.totals[name], uses, len(self.batch))
        return self.target_layout().sum_rows(ce.detach())

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
        out = rule.run(call)
        if not out.requires_grad:  # the graph begins here; a clone, since a leaf must not be changed in place
            out = out.detach().requires_grad_().clone()
        self.expected.update(names)
        kept = [replace(call, x=call.x.detach())]

        def hook(gradient: Tensor) -> None:
            (saved,) = kept
            kept.clear()  # free the input as soon as it has served
            for role, use in rule.uses(saved, as_rows(gradient), layout).items():
                if role in keys:
                    self._take(keys[role][0], use)

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

    def _take(self, name: str, use: Use) -> None:
        if name in self.mode.uncovered or name in self.plan.fallback:
            return
        if self.expected[name] == 1:
            add_squares(self.owner.totals[name], [use], len(self.batch))
        else:
            self.uses[name].append(use)


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
