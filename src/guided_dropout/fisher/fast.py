"""Squares of the per-sample gradients of a whole batch, from one forward and one backward.

Where a rule covers an operation on a parameter, its input and its output's gradient are captured; the weights require
no gradient, so autograd never forms a weight gradient of the batch. An operation without a rule is differentiated
alone, sample by sample (`dense`). Parameters that meet an operation whose samples cannot be told apart are left to the
reference loop, for that batch.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from guided_dropout.fisher.crossentropy import cross_entropy
from guided_dropout.fisher.dense import OneByOne, add_dense_squares, swapped
from guided_dropout.fisher.gathered import GatheredRows
from guided_dropout.fisher.late import IndirectError, LateHead, LeftOut
from guided_dropout.fisher.layout import Layout
from guided_dropout.fisher.operations import Operation, Origin, ParameterOperations, View, replaced
from guided_dropout.fisher.places import Place, Plan, head_at
from guided_dropout.fisher.reference import sum_of_squares
from guided_dropout.fisher.rowwise import RowByRow
from guided_dropout.fisher.rules import Call, as_rows
from guided_dropout.fisher.squares import Outer, Rows, Sums, Use, add_squares, squared_early
from guided_dropout.fisher.totals import Totals
from guided_dropout.objectives import Batch, Objective, Sample


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

    Args:
        scores_only: keep only each parameter's sum over its elements, with no memory of the parameters' size.
        per_sample: give each sample's sums with each batch.
        targets_at_once: how many targets the head sees at a time, where it can be run in parts (see `late`).

    Attributes:
        totals: the running sums.
        fallback: parameters that took the reference loop in any batch → why.
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
        targets_at_once: int | None = None,
    ):
        self.model, self.objective, self.parameters, self.plan = model, objective, parameters, plan
        self.totals = Totals(parameters, scores_only=scores_only)
        self.per_sample, self.targets_at_once = per_sample, targets_at_once
        self.fallback: dict[str, str] = dict(plan.fallback)

    def add(self, samples: Sequence[Sample]) -> Added:
        """Add a batch of samples."""
        batch = self.objective.collate(self.model, samples)
        try:
            capture = Capture(self, batch)
            losses = capture.run()
        except IndirectError:  # not seen when the plan was made; nothing has been added yet
            self.plan = replace(self.plan, late=None)
            capture = Capture(self, batch)
            losses = capture.run()
        skipped = {**capture.uncovered, **self.plan.fallback}
        self.fallback.update(skipped)
        if skipped:
            self._add_by_reference(skipped, samples, capture.sums)
        if self.totals.scores_only:
            for name, sums in capture.sums.items():
                self.totals[name].add_(sums.sum())
        self.totals.counted(len(samples))
        return Added(losses, capture.sums if self.per_sample else None)

    def _add_by_reference(self, names: Mapping[str, str], samples: Sequence[Sample], sums: dict[str, Tensor]) -> None:
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
        uncovered: parameters that this batch leaves to the reference loop → why.
    """

    def __init__(self, owner: BatchedSquares, batch: Batch):
        self.owner, self.batch, self.plan = owner, batch, owner.plan
        self.targets = batch.mask
        self.uncovered: dict[str, str] = {}
        self.mode = ParameterOperations(owner.parameters, self)
        self.head_rows: Layout | None = None
        self._is_left_out = False  # whether the head is being called with no rows, instead of later
        self._later: list[Origin] = []  # what the head uses that is called later
        self._samples = slice(None)  # whose squares are being taken
        self.sums: dict[str, Tensor] = {}
        self._gathered = GatheredRows(len(batch))
        self._expected: defaultdict[str, Counter[View]] = defaultdict(Counter)
        self._looked_up: defaultdict[str, list[Tensor]] = defaultdict(list)  # rows of tables, by parameter
        self._behind: set[str] = set()  # parameters with derived tensors in use
        self._parts: defaultdict[str, list[tuple[View, Use | OneByOne]]] = defaultdict(list)
        self._derived: list[tuple[Origin, Use | OneByOne]] = []
        if owner.per_sample or owner.totals.scores_only:
            zeros = {
                n: torch.zeros(len(batch), dtype=torch.float64, device=p.device) for n, p in owner.parameters.items()
            }
            self.sums.update(zeros)

    def run(self) -> Tensor:
        """Forward and, where all losses are finite, backward; returns the losses [B]."""
        if self.plan.late is not None:
            return self._run_late(self.plan.late)
        logits = self.forward()
        if self.plan.head is None:
            logits = self.batch.at_targets(logits)
        losses = self._losses(logits, self.batch)
        del logits  # its memory becomes the gradient's
        sums = self.target_layout().sum_rows(losses.detach())
        if not sums.isfinite().all():
            return sums
        if losses.requires_grad:
            losses.sum().backward()
        self._square_kept()
        return sums

    def _run_late(self, late: LateHead) -> Tensor:
        """The same, with the head's forward and backward between those of the rest, on some samples at a time."""
        rows, layout = self._before_head(late), self.target_layout()
        gradient, sums = torch.zeros_like(rows), []
        groups = self._groups(late, rows, layout)
        for self._samples in groups:
            at = slice(layout.offsets[self._samples.start], layout.offsets[self._samples.stop])
            x, own = rows[at].detach().requires_grad_(rows.requires_grad), layout.part(self._samples)
            losses = self._losses(self._through_head(late, x, own), self.batch.part(self._samples))
            sums.append(own.sum_rows(losses.detach()))
            if len(groups) == 1 and not sums[0].isfinite().all():
                return sums[0]
            if losses.requires_grad:
                losses.sum().backward()
            if x.grad is not None:
                gradient[at] = x.grad
        self._samples = slice(None)
        if rows.requires_grad:
            rows.backward(gradient)
        self._square_kept()
        return torch.cat(sums)

    def _losses(self, logits: Tensor, batch: Batch) -> Tensor:
        return self.owner.objective.target_losses(logits, batch, cross_entropy)

    def forward(self) -> Tensor:
        """The logits [B, T, V], or [M, V] where the head sees target positions only."""
        if self.plan.late is not None:
            return self._through_head(self.plan.late, self._before_head(self.plan.late), self.target_layout())
        with self.mode, head_at(self.plan.head, self.targets, self._entered_head):
            return self.owner.model(**self.batch.inputs).logits

    def _before_head(self, late: LateHead) -> Tensor:
        """The model's forward without its head: what that is to see at the targets, [M, d]."""
        left_out = LeftOut(self.targets, self._left_head_out)
        with self.mode, left_out.of(late.module):
            logits = self.owner.model(**self.batch.inputs).logits
        return left_out.rows(logits)

    def _left_head_out(self, inside: bool) -> None:
        self._is_left_out = inside

    def _through_head(self, late: LateHead, rows: Tensor, layout: Layout) -> Tensor:
        """The logits of some targets: rows [m, d] → [m, V]."""
        self.head_rows = layout
        with self.mode:
            logits = late.module(rows)
        self.head_rows = None
        return logits

    def _groups(self, late: LateHead, rows: Tensor, layout: Layout) -> list[slice]:
        """Groups of samples between which nothing of the head need be kept; one where that is not certain."""
        groups = late.groups(layout.offsets, self.owner.targets_at_once)
        if len(groups) > 1 and all(map(self._is_squared_at_once, self._later)) and late.is_finite(rows):
            return groups
        return [slice(0, len(self.batch))]

    def target_layout(self) -> Layout:
        """Which of the M target rows are whose."""
        return Layout((0, *self.targets.sum(1).cumsum(0).tolist()))

    def _entered_head(self, inside: bool) -> None:
        self.head_rows = self.target_layout() if inside else None

    def is_constant(self, operation: Operation) -> bool:
        """Whether the plan says so, or there are only parameters in it."""
        alone = all(operation.origin_of(t) for t in operation.tensors())
        return alone or self._place(operation).kind == "constant"

    def _place(self, operation: Operation) -> Place:
        if self.plan.late is not None and self.head_rows is not None:
            return Place("head")
        return self.plan.place(operation.key).within(operation, len(self.batch))

    def other(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """Follow rows picked from the batch."""
        self._gathered.follow(function, args, kwargs, out)

    def visit(self, operation: Operation) -> Any:
        """Run one operation and capture what its parameters need."""
        if not torch.is_grad_enabled():  # autograd would see nothing of it either
            return operation.run()
        if self._is_left_out:
            self._later = list(operation.origins.values())
            self._expect(self._later)  # once a sample, in however many groups
            return operation.run()
        place = self._place(operation)
        owners = self._gathered.owners(operation.tensors())
        if all(name in self.plan.fallback for name in operation.key[0]):
            out = operation.run()
        elif arranged := self._arranged(operation, place, owners):
            out = self._by_rule(operation, *arranged)
        elif place.kind == "alone" and owners is None:
            out = self._alone(operation, place)
        else:
            reason = place.reason or f"rows of {operation.name} unknown"
            self.uncovered.update(dict.fromkeys(operation.key[0], reason))
            out = operation.run()
        if owners is not None:
            self._gathered.follow(operation.function, operation.args, operation.kwargs, out)
        return out

    def _arranged(self, operation: Operation, place: Place, owners: Tensor | None) -> tuple[Call, Layout] | None:
        """The call and the owners of its rows; None where no rule covers it or this batch does not have its form."""
        call, rule, samples = operation.call, operation.rule, len(self.batch)
        if call is None or rule is None:
            return None
        x, is_lookup = call.x, not call.x.is_floating_point()
        if owners is not None:
            if is_lookup or x.shape[:1] != owners.shape:
                return None
            layout = Layout.of_owners(owners, samples)
            return call, layout.finer(x.shape[1:-1].numel()) if rule.by_rows else layout
        if place.kind == "head":
            return (call, self.head_rows) if self.head_rows is not None else None
        if place.kind == "shared":
            x = x.expand(samples, *x.shape[-1:] if x.dim() == 1 else x.shape[1:])
            return replace(call, x=x), Layout.even(x.numel(), samples)
        if place.kind != "rows" or x.dim() <= place.dim or x.shape[place.dim] % samples:
            return None
        if not rule.by_rows and not place.interleaved:
            return replace(call, batch_dim=place.dim), Layout.even(x.shape[place.dim], samples)
        leading = x.shape if is_lookup else x.shape[:-1]
        if not rule.by_rows:
            return None
        if place.dim == 0 and not place.interleaved:
            return call, Layout.even(leading.numel(), samples)
        grid = torch.arange(leading[place.dim], device=x.device)
        grid = grid % samples if place.interleaved else grid // (leading[place.dim] // samples)
        grid = grid.view(-1, *[1] * (len(leading) - place.dim - 1)).expand(leading)
        return call, Layout.of_owners(grid.reshape(-1), samples)

    def _by_rule(self, operation: Operation, call: Call, layout: Layout) -> Tensor:
        rule = operation.rule
        assert rule is not None
        roles = {role: o for role, t in call.parameters.items() if (o := operation.origin_of(t))}
        if self.plan.late is None or self.head_rows is None:
            self._expect(roles.values())
        for origin in roles.values():
            if not call.x.is_floating_point() and origin.view is not None:
                self._looked_up[origin.names[0]].append(call.x.reshape(-1))
        if rule.input_gradient is not None and call.x.requires_grad:
            return RowByRow(call, rule, layout, lambda uses: self.take(uses, roles)).run()
        out = _begun(rule.run(call))
        kept = [replace(call, x=call.x.detach(), options={k: v for k, v in call.options.items() if k not in _SPENT})]

        def hook(gradient: Tensor) -> None:
            saved = kept.pop()  # free the input as soon as it has served
            gradient = rule.like_x(saved, gradient)
            if rule.by_rows:
                self.take(rule.uses(saved, as_rows(gradient), layout), roles)
            else:
                first = replace(saved, x=saved.x.movedim(saved.batch_dim, 0))
                self.take(rule.uses(first, gradient.movedim(saved.batch_dim, 0), layout), roles)

        out.register_hook(hook)
        return out

    def _alone(self, operation: Operation, place: Place) -> Tensor:
        """An operation without a rule: differentiated by itself, sample by sample."""
        origins = list(operation.origins.values())
        self._expect(origins)
        out = _begun(operation.run())
        # Values only: a graph's tensor that one of the graph's own hooks holds would never be freed.
        values = {id(t): t if operation.origin_of(t) else t.detach() for t in operation.tensors()}
        args, kwargs = replaced((operation.args, operation.kwargs), lambda t: values[id(t)])
        dims = {id(values[id(t)]): d for t, d in zip(operation.tensors(), place.dims, strict=True) if d is not None}

        def hook(gradient: Tensor) -> None:
            for origin in origins:
                use = OneByOne(
                    operation.function, args, kwargs, origin.tensor, dims, gradient, place.dim, len(self.batch)
                )
                self.take({"": use}, {"": origin})

        out.register_hook(hook)
        return out

    def _expect(self, origins: Iterable[Origin]) -> None:
        for o in origins:
            if o.view is None:
                self._behind.update(o.names)
            else:
                self._expected[o.names[0]][o.view.upright()] += 1

    def take(self, uses: Mapping[str, Use | OneByOne], roles: Mapping[str, Origin]) -> None:
        """Square an operation's uses, or keep those of parameters that are used again."""
        for role, use in uses.items():
            origin = roles.get(role)
            if origin is None:
                continue
            if origin.view is None:
                self._derived.append((origin, use))
                continue
            (name,), view = origin.names, origin.view
            if name in self.uncovered or name in self.plan.fallback:
                continue
            if self._is_once(name, view) and self._square(name, [(view, use)]):
                continue
            self._parts[name].append(self._squared_early(name, view, use))

    def _squared_early(self, name: str, view: View, use: Use | OneByOne) -> tuple[View, Use | OneByOne]:
        """Square the only products with a tied table at once, where all else that is done with it are look-ups."""
        if not (isinstance(use, Outer) and self._is_tied(name, view)):
            return view, use
        total = None if self.owner.totals.scores_only else self.owner.totals[name]
        outer = use if view == view.upright() else swapped(use)
        return view.upright(), squared_early(total, outer, torch.cat(self._looked_up[name]), self._sums_of(name))

    def _is_squared_at_once(self, origin: Origin) -> bool:
        """Whether nothing else that is done with it is needed for its squares."""
        (name, *_), view = origin.names, origin.view
        return view is not None and (self._is_once(name, view) or self._is_tied(name, view))

    def _is_once(self, name: str, view: View) -> bool:
        """Whether these elements of a parameter are used once in a sample, and apart from all others."""
        return self._expected[name][view.upright()] == 1 and name not in self._behind and self._apart(name)

    def _is_tied(self, name: str, view: View) -> bool:
        """Whether a parameter as a whole is used once, and otherwise looked up."""
        looked_up, upright = self._looked_up[name], view.upright()
        rest = looked_up and self._expected[name] == {upright: len(looked_up) + 1} and name not in self._behind
        return bool(rest) and upright.size == self.owner.parameters[name].shape

    def _sums_of(self, name: str) -> Tensor | None:
        """Where the sums of the samples in hand are added."""
        sums = self.sums.get(name)
        return None if sums is None else sums[self._samples]

    def _apart(self, name: str) -> bool:
        """Whether the parts of a parameter that are in use have no element in common."""
        views = sorted(self._expected[name], key=lambda v: v.offset)
        return all(a.end() <= b.offset for a, b in itertools.pairwise(views))

    def _square_kept(self) -> None:
        parts = {n: p for n, p in self._parts.items() if n not in self.uncovered}
        dense: dict[str, list[tuple[View, Use | OneByOne]]] = {
            n: parts.get(n, []) for n in self._behind if n not in self.uncovered and n not in self.plan.fallback
        }
        for name in parts.keys() - dense.keys():
            groups: defaultdict[View, list[tuple[View, Use | OneByOne]]] = defaultdict(list)
            for view, use in parts[name]:
                groups[view.upright()].append((view, use))
            if not self._apart(name):
                dense[name] = parts[name]
                continue
            left = [part for group in groups.values() if not self._square(name, group) for part in group]
            if left:
                dense[name] = left
        if dense:
            add_dense_squares(self.owner.totals, self.sums, dense, self._derived, self.mode.leaves, len(self.batch))

    def _square(self, name: str, parts: Sequence[tuple[View, Use | OneByOne]]) -> bool:
        """Square uses of the same elements of a parameter, if they have a compact form."""
        view = parts[0][0].upright()
        uses = [swapped(u) if v != view and isinstance(u, Outer) else u for v, u in parts]
        if any(isinstance(u, OneByOne) or (v != view and not isinstance(u, Outer)) for v, u in parts):
            return False
        compact = [u for u in uses if not isinstance(u, OneByOne)]
        vectors = sum(isinstance(u, Sums) for u in compact)
        totals = self.owner.totals
        total = None if totals.scores_only else view.within(totals[name])
        if vectors not in (0, len(compact)):
            return False
        matrix = next((u for u in compact if isinstance(u, Outer)), None)
        if matrix is not None and len(view.size) != 2:
            if any(isinstance(u, Rows) for u in compact) or not view.is_contiguous():
                return False
            total = None if total is None else total.view(matrix.left.shape[1], matrix.right.shape[1])
        add_squares(total, compact, self._sums_of(name))
        return True


# Of a call's options: what its backward needs no more.
_SPENT = ("x", "run")


def _begun(out: Tensor) -> Tensor:
    """`out`, or where it does not require a gradient the beginning of the graph."""
    # A clone, since a leaf must not be changed in place.
    return out if out.requires_grad else out.detach().requires_grad_().clone()


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
