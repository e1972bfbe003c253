"""Finding by running a model where its operations have the samples."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from guided_dropout.fisher.capture import Capture
from guided_dropout.fisher.dense import part_of
from guided_dropout.fisher.late import LateHead
from guided_dropout.fisher.operations import Key, Operation, ParameterOperations, replaced, tensors_of
from guided_dropout.fisher.places import Place, Plan
from guided_dropout.fisher.rules import EMBEDDING
from guided_dropout.fisher.totals import Totals
from guided_dropout.fisher.uses import Uses
from guided_dropout.fisher.variants import altered, longer
from guided_dropout.objectives import Batch, Objective, Sample

# Where a shortcut does not suit a model, one of these comes up in its forward.
UNSUITED = (RuntimeError, ValueError, TypeError, IndexError, AttributeError)


def make_plan(model: nn.Module, objective: Objective, parameters: Mapping[str, nn.Parameter], sample: Sample) -> Plan:
    """Find by running `model` on two and on three copies of a sample where each operation has the samples.

    Shortcuts (the head at target positions only, or after the forward; embeddings that the batch shares looked up per
    sample) are taken only where they leave the logits as they are.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    plans = []
    for share in (True, False):
        places, in_head = _places(model, objective, parameters, sample, head, share=share)
        plans.append(Plan(places, head, frozenset(in_head)))
        for late in (LateHead.of(head), None):
            plan = replace(plans[-1], late=late)
            if _keeps_logits(model, objective, parameters, plan, sample):
                return plan
    shared, unshared = (replace(plan, head=None) for plan in plans)
    return shared if _keeps_logits(model, objective, parameters, shared, sample) else unshared


def _places(
    model: nn.Module,
    objective: Objective,
    parameters: Mapping[str, nn.Parameter],
    sample: Sample,
    head: nn.Module | None,
    *,
    share: bool,
) -> tuple[dict[Key, Place], set[Key]]:
    """Where the operations have the samples, and which belong to the head."""
    places: dict[Key, Place] = {}
    in_head: set[Key] = set()
    other_sample = altered(model, sample)
    for padded in (False, True):  # which some models treat apart
        runs: list[_Look] = []
        for samples in ([sample] * 2, [sample] * 3, [sample, sample, other_sample]):
            look = _Look(model, share, runs[0].seen if runs else {}, len(samples))
            batch = objective.collate(model, samples)
            if padded:
                batch = objective.collate(model, [*samples, longer(sample)])
                batch = Batch({k: v[:-1] for k, v in batch.inputs.items()}, batch.targets[:-1], batch.weights[:-1])
            with look.watching(head), ParameterOperations(parameters, look):
                model(**batch.inputs)
            runs.append(look)
        two, three, other = runs
        for k in two.seen.keys() & three.seen.keys():
            place = _place(two.seen[k], three.seen[k], other.seen.get(k))
            known = places.setdefault(k, place)
            if known != place:  # a mask that is there in padded batches only
                places[k] = replace(place, unpadded=known)
        in_head |= other.in_head
    return places, in_head


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
        self.in_head: set[Key] = set()
        self._share, self._two, self._num_samples = share, two, num_samples
        self._inside = False
        self._constants: Any = WeakTensorKeyDictionary()
        for t in (*model.parameters(), *model.buffers()):
            self._constants[t] = True

    @contextlib.contextmanager
    def watching(self, head: nn.Module | None) -> Iterator[None]:
        """Within, note which operations are the head's."""

        def entered(*_: Any) -> None:
            self._inside = True

        def left(*_: Any) -> None:
            self._inside = False

        pairs = [(head.register_forward_pre_hook(entered), head.register_forward_hook(left))] if head else []
        try:
            yield
        finally:
            for handle in (h for pair in pairs for h in pair):
                handle.remove()

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
        if self._inside:
            self.in_head.add(operation.key)
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
        try:
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
        except UNSUITED:
            return False
        return True


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


def _keeps_logits(
    model: nn.Module, objective: Objective, parameters: Mapping[str, nn.Parameter], plan: Plan, sample: Sample
) -> bool:
    batch = objective.collate(model, [sample] * 2)
    with torch.no_grad():
        plain = batch.at_targets(model(**batch.inputs).logits)
    try:
        uses = Uses(parameters, Totals(parameters, scores_only=True), len(batch))
        capture = Capture(model, objective, parameters, plan, batch, uses)
        logits = capture.forward().detach()
    except UNSUITED:
        return False
    logits = logits if plan.head is not None else batch.at_targets(logits)
    return logits.shape == plain.shape and torch.allclose(logits, plain, rtol=1e-3, atol=1e-4)
