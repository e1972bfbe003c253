"""Finding by running a model where its operations have the samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from guided_dropout.fisher.activations import written_out
from guided_dropout.fisher.attention import OwnAttention
from guided_dropout.fisher.capture import Capture
from guided_dropout.fisher.dense import part_of
from guided_dropout.fisher.late import LateHead
from guided_dropout.fisher.narrow import Start, starts
from guided_dropout.fisher.operations import Key, Operation, ParameterOperations, replaced, tensors_of
from guided_dropout.fisher.places import Place, Plan
from guided_dropout.fisher.rules import EMBEDDING
from guided_dropout.fisher.shortcuts import Unsuited
from guided_dropout.fisher.totals import Totals
from guided_dropout.fisher.uses import Uses
from guided_dropout.fisher.variants import altered, longer, with_more_targets
from guided_dropout.objectives import IGNORE, Batch, Objective, Sample
from guided_dropout.undisturbed import requiring_grad

# How many ways to run the end of a model on its targets alone are tried, each a short forward.
_TRIES = 12

# Rounding to bfloat16 moves a row of logits by a few hundredths of what two rows are apart.
_ROUNDED = 0.1


def make_plan(model: nn.Module, objective: Objective, parameters: Mapping[str, nn.Parameter], sample: Sample) -> Plan:
    """Find by running `model` on two and on three copies of a sample where each operation has the samples.

    Shortcuts (the head, and all that treats each position by itself, at target positions only; the head after the
    forward; embeddings that the batch shares looked up per sample) are taken only where they leave the logits as they
    are.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    sample = with_more_targets(sample)  # one or two would not tell whether their number suits the model
    batch = objective.collate(model, [sample, altered(model, sample)])
    found_starts, logits = _starts(model, head, batch)
    coprime = _with_coprime_number(batch)

    def uncovered(plan: Plan, batch: Batch = batch) -> set[str] | None:
        return _uncovered(model, parameters, plan, batch, batch.at_targets(logits), objective)

    plans, activations = [], written_out(model)
    for share in (True, False):
        plans.append(Plan(_places(model, objective, parameters, sample, share=share), head, activations=activations))
        for late in (LateHead.of(head), None):
            plan = replace(plans[-1], late=late)
            if (found := uncovered(plan)) is not None:
                begun = (replace(plan, start=start) for start in found_starts[:_TRIES])
                return next((p for p in begun if uncovered(p, coprime) == found), plan)
    shared, unshared = (replace(plan, head=None) for plan in plans)
    return shared if uncovered(shared) is not None else unshared


def _starts(model: nn.Module, head: nn.Module | None, batch: Batch) -> tuple[list[Start], Tensor]:
    """From where on the model may be run on its targets alone, and its logits."""
    kept: list[Tensor] = []

    def forward() -> Tensor:
        with OwnAttention():
            kept.append(model(**batch.inputs).logits)
        return batch.at_targets(kept[0])

    found: list[Start] = []
    if head is None or batch.mask.sum() < 3:  # one a sample
        with torch.no_grad():
            forward()
    else:
        with requiring_grad(p for p in model.parameters() if p.is_floating_point()):
            found = starts(model, head, batch.mask, forward)
    return found, kept[0].detach()


def _places(
    model: nn.Module,
    objective: Objective,
    parameters: Mapping[str, nn.Parameter],
    sample: Sample,
    *,
    share: bool,
) -> dict[Key, Place]:
    """Where the operations have the samples."""
    places: dict[Key, Place] = {}
    other_sample = altered(model, sample)
    for padded in (False, True):  # which some models treat apart
        runs: list[_Look] = []
        for samples in ([sample] * 2, [sample] * 3, [sample, sample, other_sample]):
            look = _Look(model, share, runs[0].seen if runs else {}, len(samples))
            batch = objective.collate(model, samples)
            if padded:
                batch = objective.collate(model, [*samples, longer(sample)])
                batch = Batch({k: v[:-1] for k, v in batch.inputs.items()}, batch.targets[:-1], batch.weights[:-1])
            with ParameterOperations(parameters, look):
                model(**batch.inputs)
            runs.append(look)
        two, three, other = runs
        for k in two.seen.keys() & three.seen.keys():
            place = _place(two.seen[k], three.seen[k], other.seen.get(k))
            known = places.setdefault(k, place)
            if known != place:  # a mask that is there in padded batches only
                places[k] = replace(place, unpadded=known)
    return places


@dataclass(frozen=True)
class _Seen:
    """One operation in one run.

    Attributes:
        kind: ``"samples"``, ``"shared"``, ``"constant"`` or ``"several"`` (outputs).
        name: what it is called.
        has_rule: whether a rule covers it, which says in `repeats` along which dimensions the samples may lie.
        x: shape of the rule's operand.
        tensors: shapes of all tensors.
        out: shape of the output.
        separable: whether it can be run on each sample's part alone; not asked where a rule finds rows.
        prints: [n] float64, a number for each index of the operand's dimension of samples.
    """

    kind: str
    name: str
    has_rule: bool = False
    repeats: Callable[[int], bool] = lambda dim: True
    x: tuple[int, ...] = ()
    tensors: tuple[tuple[int, ...], ...] = ()
    out: tuple[int, ...] | None = None
    separable: bool = False
    prints: Tensor | None = None


class _Look:
    """Notes each operation on parameters of one run, and what in the run does not depend on the samples."""

    def __init__(self, model: nn.Module, share: bool, two: Mapping[Key, _Seen], num_samples: int):
        self.seen: dict[Key, _Seen] = {}
        self._share, self._two, self._num_samples = share, two, num_samples
        self._constants: Any = WeakTensorKeyDictionary()
        for t in (*model.parameters(), *model.buffers()):
            self._constants[t] = True

    def is_constant(self, operation: Operation) -> bool:
        others = [t for t in operation.tensors() if operation.origin_of(t) is None]
        if not all(t in self._constants for t in others):
            return False
        call = operation.call
        shared = operation.rule is EMBEDDING and call is not None and call.x.dim() in (1, 2)
        if self._share and shared and call is not None and (call.x.dim() == 1 or call.x.shape[0] == 1):
            return False
        self.seen[operation.key] = _Seen("constant", operation.name)
        return True

    def visit(self, operation: Operation) -> Any:
        tensors = tuple(t.shape for t in operation.tensors())  # before the operation, which may be in place
        others = [t for t in operation.tensors() if operation.origin_of(t) is None]
        constant = all(t in self._constants for t in others)
        separable = not constant and not self._has_rows(operation) and self._is_separable(operation)
        prints = self._prints(operation)
        out = operation.run()
        if not isinstance(out, Tensor):
            self.seen[operation.key] = _Seen("several", operation.name)
            return out
        call = operation.call
        self.seen[operation.key] = _Seen(
            "shared" if constant else "samples",
            operation.name,
            call is not None,
            (lambda dim: True) if call is None or operation.rule is None else operation.rule.repeats_along(call),
            () if call is None else call.x.shape,
            tensors,
            out.shape,
            separable,
            prints,
        )
        return out

    def other(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        constant = all(t in self._constants for t in tensors_of((args, kwargs)))
        name = function.__name__
        changed = tensors_of(args[:1]) if name == "__setitem__" or name.endswith("_") else []
        for t in (*tensors_of(out), *changed):
            if constant:
                self._constants[t] = True
            else:
                self._constants.pop(t, None)

    def _prints(self, operation: Operation) -> Tensor | None:
        two = self._two.get(operation.key)
        if two is None or operation.call is None:
            return None
        x = operation.call.x
        dim = _batch_dim(two.x, x.shape)
        if dim is None:
            return None
        parts = x.detach().movedim(dim, 0).flatten(1).double() if x.dim() > 1 else x[:, None].double()
        return parts @ torch.arange(parts.shape[1], dtype=torch.float64, device=x.device).add(1).cos()

    def _has_rows(self, operation: Operation) -> bool:
        """Whether a rule covers the operation and finds the samples along one dimension of its operand."""
        two, call, rule = self._two.get(operation.key), operation.call, operation.rule
        dim = None if two is None or call is None else _batch_dim(two.x, call.x.shape)
        return dim is not None and rule is not None and call is not None and rule.repeats_along(call)(dim)

    def _is_separable(self, operation: Operation) -> bool:
        """Whether the operation on one sample's parts gives that sample's part of the output."""
        two = self._two.get(operation.key)
        tensors = operation.tensors()
        if two is None or two.out is None or len(tensors) != len(two.tensors) or operation.name.strip("_") in _NOISY:
            return False
        if operation.name.endswith("_") and not operation.name.endswith("__"):
            return False  # in place: its input is gone when it is differentiated
        dims = [_batch_dim(a, t.shape) for a, t in zip(two.tensors, tensors, strict=True)]
        by_id = {id(t): d for t, d in zip(tensors, dims, strict=True) if d is not None}
        with Unsuited():
            whole = operation.run()
            dim = _batch_dim(two.out, whole.shape)
            if dim is None:
                return False
            for b in range(self._num_samples):
                args, kwargs = replaced(
                    (operation.args, operation.kwargs),
                    lambda t, b=b: part_of(t, by_id[id(t)], b, self._num_samples) if id(t) in by_id else t,
                )
                own = operation.function(*args, **kwargs)
                want = part_of(whole, dim, b, self._num_samples)
                if own.shape != want.shape or not torch.allclose(own, want, rtol=1e-3, atol=1e-5):
                    return False
            return True
        return False


# In place through an operator, or random.
_NOISY = frozenset(["iadd", "isub", "imul", "itruediv", "setitem", "dropout", "bernoulli", "rand_like"])


def _place(two: _Seen, three: _Seen, other: _Seen | None) -> Place:
    if two.kind == three.kind == "constant":
        return Place("constant")
    if two.kind == three.kind == "shared":
        return Place("shared")
    name = three.name
    if two.kind != three.kind or three.kind != "samples" or two.out is None or three.out is None:
        return Place("unknown", reason=f"no rule for {name}")
    if other is None or other.tensors != three.tensors:
        return Place("unknown", reason=f"rows of {name} unknown")  # how many a sample has depends on its tokens
    dims = tuple(_batch_dim(a, b) for a, b in zip(two.tensors, three.tensors, strict=True))
    if three.has_rule:
        dim = _batch_dim(two.x, three.x)
        if dim is not None and three.repeats(dim):
            for interleaved in (False, True):
                if _in_order(three.prints, other.prints, interleaved=interleaved):
                    return Place("rows", dim, dims, interleaved)
            return Place("unknown", reason=f"rows of {name} are not in the samples' order")
    dim = _batch_dim(two.out, three.out)
    if dim is None:
        return Place("unknown", reason=f"shared by the batch in {name}")
    if other.separable:
        return Place("alone", dim, dims)
    return Place("unknown", reason=f"no rule for {name}")


def _in_order(three: Tensor | None, other: Tensor | None, *, interleaved: bool) -> bool:
    """Whether at most the last of three samples' parts changed when that sample did."""
    if three is None or other is None or three.shape != other.shape:
        return False
    numbers = torch.arange(len(three), device=three.device)
    owners = numbers % 3 if interleaved else numbers // (len(three) // 3)
    changed = (three - other).abs() > 1e-4 * three.abs() + 1e-5 * three.abs().max()
    return not bool(changed[owners != 2].any())


def _batch_dim(two: Sequence[int], three: Sequence[int]) -> int | None:
    """The dimension that grows with the batch: its size with two and with three samples is 2 k and 3 k."""
    if len(two) != len(three):
        return None
    grown = [i for i, (a, b) in enumerate(zip(two, three, strict=True)) if a != b]
    return grown[0] if len(grown) == 1 and two[grown[0]] * 3 == three[grown[0]] * 2 else None


def _with_coprime_number(batch: Batch) -> Batch:
    """The same batch without so many of its first targets that a model's own shapes, B and T, do not suit the rest."""
    places, mask = batch.mask.nonzero(), torch.ones_like(batch.mask)
    for place in places:
        if math.gcd(len(places) - int((~mask).sum()), mask.numel()) == 1:
            break
        mask[tuple(place)] = False
    return replace(batch, targets=batch.targets.where(mask, IGNORE), weights=batch.weights * mask)


def _uncovered(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    plan: Plan,
    batch: Batch,
    plain: Tensor,
    objective: Objective,
) -> set[str] | None:
    """Parameters that no rule covers; None where the plan's shortcuts do not keep the logits `plain` at the targets."""
    uses = Uses(parameters, Totals(parameters, scores_only=True), len(batch))
    capture = Capture(model, objective, parameters, plan, batch, uses)
    logits = None
    with Unsuited():
        logits = capture.forward().detach()
    if logits is None:
        return None
    logits = logits if plan.head is not None else batch.at_targets(logits)
    kept = logits.shape == plain.shape and _are_alike(logits, plain)
    return set(uses.uncovered) if kept and capture.narrowed.has_begun == (plan.start is not None) else None


def _are_alike(logits: Tensor, plain: Tensor) -> bool:
    """Whether [M, V] differ by rounding only: in half precision, by little of what tells one row from another."""
    if plain.dtype not in (torch.bfloat16, torch.float16):
        return torch.allclose(logits, plain, rtol=1e-3, atol=1e-4)
    plain = plain.float()
    apart = (plain - plain.mean(0)).norm(dim=-1).mean()
    return bool((torch.linalg.vector_norm(logits.float() - plain, dim=-1) <= _ROUNDED * apart).all())
