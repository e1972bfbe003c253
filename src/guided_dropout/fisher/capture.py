"""One batch through a model, forward and backward: what each parameter's operations contribute is captured.

Where a rule covers an operation on a parameter, its input and its output's gradient are captured; the weights require
no gradient, so autograd never forms a weight gradient of the batch. An operation without a rule is differentiated
alone, sample by sample (`dense`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from guided_dropout.fisher.activations import in_one_step
from guided_dropout.fisher.attention import OwnAttention
from guided_dropout.fisher.crossentropy import cross_entropy
from guided_dropout.fisher.dense import OneByOne
from guided_dropout.fisher.gathered import GatheredRows, leading_ones
from guided_dropout.fisher.late import LateHead, LeftOut
from guided_dropout.fisher.layout import Layout
from guided_dropout.fisher.narrow import Narrowed
from guided_dropout.fisher.operations import Operation, Origin, ParameterOperations, replaced
from guided_dropout.fisher.places import Place, Plan, head_at
from guided_dropout.fisher.rowwise import RowByRow
from guided_dropout.fisher.rules import Call, Rule, as_rows
from guided_dropout.fisher.uses import Uses
from guided_dropout.objectives import Batch, Objective


class Capture:
    """One batch's forward and backward.

    Args:
        model: in the mode in which its Fisher is measured.
        objective: its loss.
        parameters: whose operations are seen.
        plan: where the samples lie.
        batch: the samples.
        uses: gets what the operations contribute.
        targets_at_once: how many targets the head sees at a time, where it can be run in parts (see `late`).
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        parameters: Mapping[str, nn.Parameter],
        plan: Plan,
        batch: Batch,
        uses: Uses,
        targets_at_once: int | None = None,
    ):
        self.model, self.objective, self.plan, self.batch, self.uses = model, objective, plan, batch, uses
        self.targets_at_once = targets_at_once
        self.mode = ParameterOperations(parameters, self)
        self.narrowed = Narrowed(batch.mask)
        self._layout = Layout((0, *batch.mask.sum(1).cumsum(0).tolist()))  # which of the M targets are whose
        self._in_head: Layout | None = None  # whose the rows are that the head is seeing
        self._is_late = False
        self._is_left_out = False  # whether the head is being called with no rows, instead of later
        self._later: list[Origin] = []  # what the head uses that is called later
        self._gathered = GatheredRows(batch, (*model.parameters(), *model.buffers()), self._layout, self.narrowed)

    def run(self) -> Tensor:
        """Forward and, where all losses are finite, backward; returns the losses [B]."""
        if self.plan.late is not None:
            return self._run_late(self.plan.late)
        logits = self.forward()
        if self.plan.head is None:
            logits = self.batch.at_targets(logits)
        losses = self._losses(logits, self.batch)
        del logits  # its memory becomes the gradient's
        sums = self._layout.sum_rows(losses.detach())
        if not sums.isfinite().all():
            return sums
        if losses.requires_grad:
            losses.sum().backward()
        self.uses.square_kept(self.mode.leaves)
        return sums

    def _run_late(self, late: LateHead) -> Tensor:
        """The same, with the head's forward and backward between those of the rest, on some samples at a time."""
        rows, layout = self._before_head(late), self._layout
        gradient, sums = torch.zeros_like(rows), []
        groups = self._groups(late, rows, layout)
        for self.uses.samples in groups:
            at = slice(layout.offsets[self.uses.samples.start], layout.offsets[self.uses.samples.stop])
            x, own = rows[at].detach().requires_grad_(rows.requires_grad), layout.part(self.uses.samples)
            losses = self._losses(self._through_head(late, x, own), self.batch.part(self.uses.samples))
            sums.append(own.sum_rows(losses.detach()))
            if len(groups) == 1 and not sums[0].isfinite().all():
                return sums[0]
            if losses.requires_grad:
                losses.sum().backward()
            if x.grad is not None:
                gradient[at] = x.grad
        self.uses.samples = slice(None)
        if rows.requires_grad:
            rows.backward(gradient)
        self.uses.square_kept(self.mode.leaves)
        return torch.cat(sums)

    def _losses(self, logits: Tensor, batch: Batch) -> Tensor:
        return self.objective.target_losses(logits, batch, cross_entropy)

    def forward(self) -> Tensor:
        """The logits [B, T, V], or [M, V] where the head sees target positions only."""
        if self.plan.late is not None:
            return self._through_head(self.plan.late, self._before_head(self.plan.late), self._layout)
        at_head = head_at(self.plan.head, self.narrowed.at_targets, self._entered_head)
        with self._running(), at_head:
            return self.model(**self.batch.inputs).logits

    def _before_head(self, late: LateHead) -> Tensor:
        """The model's forward without its head: what that is to see at the targets, [M, d]."""
        left_out = LeftOut(self.narrowed.at_targets, self._left_head_out)
        with self._running(), left_out.of(late.module, self.model):
            logits = self.model(**self.batch.inputs).logits
        return left_out.rows(logits)

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """Within, the model runs as planned, and its operations are seen."""
        with OwnAttention(), self.mode, self.narrowed.of(self.plan.start), in_one_step(self.plan.activations):
            yield

    def _left_head_out(self, inside: bool) -> None:
        self._is_left_out = inside

    def _through_head(self, late: LateHead, rows: Tensor, layout: Layout) -> Tensor:
        """The logits of some targets: rows [m, d] → [m, V]."""
        self._in_head, self._is_late = layout, True
        with self.mode, in_one_step(self.plan.activations):
            logits = late.module(rows)
        self._in_head, self._is_late = None, False
        return logits.to(self.batch.targets.device)  # where the model would have put them

    def _groups(self, late: LateHead, rows: Tensor, layout: Layout) -> list[slice]:
        """Groups of samples between which nothing of the head need be kept; one where that is not certain."""
        groups = late.groups(layout.offsets, self.targets_at_once)
        if len(groups) > 1 and all(map(self.uses.is_squared_at_once, self._later)) and late.is_finite(rows):
            return groups
        return [slice(0, len(self.batch))]

    def _entered_head(self, inside: bool) -> None:
        self._in_head = self._layout if inside else None

    def is_constant(self, operation: Operation) -> bool:
        """Whether the plan says so, or there are only parameters in it."""
        alone = all(operation.origin_of(t) for t in operation.tensors())
        return alone or self._place(operation).kind == "constant"

    def _place(self, operation: Operation) -> Place:
        place = self.plan.place(operation.key).within(operation, len(self.batch))
        tensors = _of_samples(operation)
        if self._in_head is None and all(self.narrowed.dim(t) is None for t in tensors):
            elsewhere = self.narrowed.has_begun and not any(map(self.narrowed.has_all, tensors))
            if elsewhere and place.kind in ("rows", "alone"):
                # Samples have unlike numbers of targets, and in this shape nothing says where theirs are.
                return Place("unknown", reason=f"{operation.name} on the targets alone, in another shape")
            return place
        return place if place.kind == "constant" else Place("targets")

    def other(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """Follow rows picked from the batch."""
        self._gathered.follow(function, args, kwargs, out)

    def visit(self, operation: Operation) -> Any:
        """Run one operation and capture what its parameters need."""
        if not torch.is_grad_enabled():  # autograd would see nothing of it either
            return operation.run()
        if self._is_left_out:
            self._later = list(operation.origins.values())
            self.uses.expect(self._later)  # once a sample, in however many groups
            return operation.run()
        place = self._place(operation)
        owners, lost = self._gathered.owners(operation.tensors()), self._gathered.has_lost(operation.tensors())
        followed = owners is not None or lost
        if all(name in self.plan.fallback for name in operation.key[0]):
            out = operation.run()
        elif arranged := self._arranged(operation, place, owners, lost):
            out = self._by_rule(operation, *arranged)
            followed = owners is not None
        elif place.kind == "alone" and owners is None and (not lost or self._are_whole(operation, place)):
            out = self._alone(operation, place)
            followed = False
        else:
            reason = place.reason or f"rows of {operation.name} unknown"
            self.uses.uncovered.update(dict.fromkeys(operation.key[0], reason))
            out = operation.run()
        if followed:
            self._gathered.follow(operation.function, operation.args, operation.kwargs, out)
        return out

    def _are_whole(self, operation: Operation, place: Place) -> bool:
        """Whether picked rows, wherever they went meanwhile, have come back as [B, ·, ·] with the samples in order."""
        batch = len(self.batch)
        picked = [(t, d) for t, d in zip(operation.tensors(), place.dims, strict=False) if self._gathered.has_lost([t])]
        return not place.interleaved and all(d == 0 and t.dim() > 2 and len(t) == batch for t, d in picked)

    def _arranged(
        self, operation: Operation, place: Place, owners: Tensor | None, lost: bool
    ) -> tuple[Call, Layout] | None:
        """The call and the owners of its rows; None where no rule covers it or this batch does not have its form."""
        call, rule, samples = operation.call, operation.rule, len(self.batch)
        if call is None or rule is None:
            return None
        x, is_lookup = call.x, not call.x.is_floating_point()
        if lost and (owners is not None or place.kind != "rows" or not self._are_whole(operation, place)):
            return None
        if owners is not None:
            ones = leading_ones(x, len(owners))
            if is_lookup or ones is None or (ones and not rule.by_rows):
                return None
            layout = Layout.of_owners(owners, samples)
            return call, layout.finer(x.shape[ones + 1 : -1].numel()) if rule.by_rows else layout
        if place.kind == "targets":
            return self._at_targets(call, rule)
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

    def _at_targets(self, call: Call, rule: Rule) -> tuple[Call, Layout] | None:
        if self._in_head is not None:
            return call, self._in_head
        dim, x = self.narrowed.dim(call.x), call.x
        if dim is None:
            return None
        if rule.by_rows:
            leading = x.shape if not x.is_floating_point() else x.shape[:-1]
            return call, self._layout.finer(leading[dim + 1 :].numel())
        return (replace(call, batch_dim=dim), self._layout) if rule.repeats_along(call)(dim) else None

    def _by_rule(self, operation: Operation, call: Call, layout: Layout) -> Tensor:
        rule = operation.rule
        assert rule is not None
        roles = {role: o for role, t in call.parameters.items() if (o := operation.origin_of(t))}
        if not self._is_late:
            self.uses.expect(roles.values())
        for origin in roles.values():
            if not call.x.is_floating_point():
                self.uses.look_up(origin, call.x)
        if rule.input_gradient is not None and call.x.requires_grad:
            return RowByRow(call, rule, layout, lambda uses: self.uses.take(uses, roles)).run()
        out = _begun(rule.run(call))
        kept = [replace(call, x=call.x.detach(), options={k: v for k, v in call.options.items() if k not in _SPENT})]

        def hook(gradient: Tensor) -> None:
            saved = kept.pop()  # free the input as soon as it has served
            gradient = rule.like_x(saved, gradient)
            if rule.by_rows:
                self.uses.take(rule.uses(saved, as_rows(gradient), layout), roles)
            else:
                first = replace(saved, x=saved.x.movedim(saved.batch_dim, 0))
                self.uses.take(rule.uses(first, gradient.movedim(saved.batch_dim, 0), layout), roles)

        out.register_hook(hook)
        return out

    def _alone(self, operation: Operation, place: Place) -> Tensor:
        """An operation without a rule: differentiated by itself, sample by sample."""
        origins = list(operation.origins.values())
        self.uses.expect(origins)
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
                self.uses.take({"": use}, {"": origin})

        out.register_hook(hook)
        return out


def _of_samples(operation: Operation) -> list[Tensor]:
    return [t for t in operation.tensors() if operation.origin_of(t) is None]


# Of a call's options: what its backward needs no more.
_SPENT = ("x", "run")


def _begun(out: Tensor) -> Tensor:
    """`out`, or where it does not require a gradient the beginning of the graph."""
    # A clone, since a leaf must not be changed in place.
    return out if out.requires_grad else out.detach().requires_grad_().clone()
