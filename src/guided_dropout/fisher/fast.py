"""Squares of the per-sample gradients of a whole batch, from one forward and one backward.

Each operation on a parameter is seen by a ``TorchFunctionMode``, whatever module it stands in. Where a rule covers it,
its input and its output's gradient are captured; the weights require no gradient, so autograd never forms a weight
gradient of the batch. Parameters that meet an operation without a rule are left to the reference loop, for that batch.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from guided_dropout.fisher.reference import sum_of_squares
from guided_dropout.fisher.rules import EMBEDDING, RULES, Call, Layout, Rule, Use, add_squares, as_rows
from guided_dropout.objectives import IGNORE, Batch, Objective, Sample

# A parameter's n-th operation in a forward: the same operation in each batch.
Key = tuple[str, int]

# Where a shortcut does not suit a model, one of these comes up in its forward.
_UNSUITED = (RuntimeError, ValueError, TypeError, IndexError, AttributeError)


class ParameterOperations(TorchFunctionMode):
    """Calls `visit` for each operation that takes a parameter and has a rule; collects the names of the others.

    Attributes:
        uncovered: parameters that took part in an operation without a rule.
    """

    def __init__(self, names: Mapping[int, str], visit: Callable[[Rule, Call, dict[str, Key]], Tensor | None]):
        super().__init__()
        self.uncovered: set[str] = set()
        self._names = dict(names)
        self._visit = visit
        self._seen: Counter[str] = Counter()
        self._derived: list[Tensor] = []  # kept alive, so that no id is used twice

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for a in (*args, *kwargs.values()) for t in (a if isinstance(a, (list, tuple)) else (a,))]
        names = {self._names[id(t)] for t in tensors if id(t) in self._names}
        if not names:
            return func(*args, **kwargs)
        rule = RULES.get(func)
        call = rule.bind(*args, **kwargs) if rule else None
        if rule and call and id(call.x) not in self._names:
            roles = {r: self._names[id(p)] for r, p in call.parameters.items() if id(p) in self._names}
            if set(roles.values()) == names:
                out = self._visit(rule, call, {r: (n, self._seen[n]) for r, n in roles.items()})
                self._seen.update(names)
                if out is not None:
                    return out
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and any(out is t for t in tensors):
            return out  # a conversion that had nothing to convert
        if isinstance(out, Tensor) and _same_derivative(func, args, out):
            self._names[id(out)] = next(iter(names))
            self._derived.append(out)
        elif isinstance(out, Tensor) or (isinstance(out, (list, tuple)) and any(isinstance(t, Tensor) for t in out)):
            self.uncovered |= names
        return out


def _same_derivative(func: Any, args: Sequence[Any], out: Tensor) -> bool:
    """Whether `out` is a vector parameter plus a constant, or in another precision (Gemma's ``1 + weight.float()``)."""
    if out.dim() != 1 or not out.is_floating_point():
        return False
    if func in (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__):
        return any(isinstance(a, (int, float)) for a in args)
    return func in (Tensor.float, Tensor.double, Tensor.to, Tensor.type_as)


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


class BatchedSquares:
    """Adds up the squares of the per-sample gradients, batch by batch.

    Attributes:
        totals: name → sum of squares so far, shaped as the parameter; float32, or float64 for float64 parameters.
    """

    def __init__(self, model: nn.Module, objective: Objective, parameters: Mapping[str, nn.Parameter], plan: Plan):
        self.model, self.objective, self.parameters, self.plan = model, objective, parameters, plan
        self.totals = {
            n: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for n, p in parameters.items()
        }
        self.fallback: set[str] = set()

    def add(self, samples: Sequence[Sample]) -> Tensor:
        """Add a batch of samples; return their losses [B]."""
        batch = self.objective.collate(self.model, samples)
        capture = _Capture(self, batch)
        losses = capture.run()
        skipped = capture.mode.uncovered | self.plan.fallback
        self.fallback |= skipped
        if skipped:
            self._add_by_reference(skipped, samples)
        return losses

    def _add_by_reference(self, names: set[str] | frozenset[str], samples: Sequence[Sample]) -> None:
        some = {n: self.parameters[n] for n in self.parameters if n in names}
        with requiring_grad(some.values()):
            for name, squares in sum_of_squares(self.model, some, samples, self.objective).items():
                self.totals[name] += squares


class _Capture:
    """One batch's forward and backward."""

    def __init__(self, owner: BatchedSquares, batch: Batch):
        self.owner, self.batch, self.plan = owner, batch, owner.plan
        self.targets = batch.targets != IGNORE
        self.uses: defaultdict[str, list[Use]] = defaultdict(list)
        self.expected: Counter[str] = Counter()
        self.mode = ParameterOperations({id(p): n for n, p in owner.parameters.items()}, self.visit)
        self.head_rows: Layout | None = None

    def run(self) -> Tensor:
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
        with self.mode, head_at(self.plan.head, self.targets, self._entered_head):
            return self.owner.model(**self.batch.inputs).logits

    def target_layout(self) -> Layout:
        return Layout((0, *self.targets.sum(1).cumsum(0).tolist()))

    def _entered_head(self, inside: bool) -> None:
        self.head_rows = self.target_layout() if inside else None

    def visit(self, rule: Rule, call: Call, keys: dict[str, Key]) -> Tensor | None:
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


def make_plan(model: nn.Module, objective: Objective, parameters: Mapping[str, nn.Parameter], sample: Sample) -> Plan:
    """Find by running `model` on two and on three copies of a sample which operations are per sample.

    Shortcuts (the head at target positions only; embeddings that the batch shares looked up per sample) are taken only
    where they leave the logits as they are.
    """
    shapes: list[dict[Key, tuple[str, torch.Size]]] = []
    for copies in (2, 3):
        seen: dict[Key, tuple[str, torch.Size]] = {}

        def visit(rule: Rule, call: Call, keys: dict[str, Key], seen: dict[Key, tuple[str, torch.Size]] = seen) -> None:
            seen.update(dict.fromkeys(keys.values(), (rule.name, call.x.shape)))

        batch = objective.collate(model, [sample] * copies)
        mode = ParameterOperations({id(p): n for n, p in parameters.items()}, visit)
        with torch.no_grad(), mode:
            model(**batch.inputs)
        shapes.append(seen)
    layouts = {k: kind for k in shapes[0] if k in shapes[1] and (kind := _layout_kind(shapes[0][k], shapes[1][k]))}
    unshared = {k: v for k, v in layouts.items() if v != "shared"}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for candidate in (Plan(layouts, head), Plan(unshared, head), Plan(layouts, None)):
        candidate = _with_head_layout(candidate, model, parameters)
        if _keeps_logits(model, objective, parameters, candidate, sample):
            return candidate
    return Plan(unshared, None)


def _layout_kind(two: tuple[str, torch.Size], three: tuple[str, torch.Size]) -> str | None:
    (rule, a), (_, b) = two, three
    is_lookup = rule == EMBEDDING.name
    if len(a) != len(b) or len(a) < (1 if is_lookup else 2):
        return None
    if a[0] == 2 and b[0] == 3:
        return "batch"
    if len(a) == 2 and not is_lookup and a[0] % 2 == 0 and a[0] // 2 * 3 == b[0]:
        return "flat"
    if is_lookup and a == b and (len(a) == 1 or (len(a) == 2 and a[0] == 1)):
        return "shared"
    return None


def _with_head_layout(plan: Plan, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Plan:
    """The head's own parameters get the head's layout in their last operation, which is the head's."""
    if plan.head is None:
        return plan
    own = {id(p) for p in plan.head.parameters(recurse=False)}
    layouts = dict(plan.layouts)
    for name in (n for n, p in parameters.items() if id(p) in own):
        uses = [k for k in layouts if k[0] == name]
        if uses:
            layouts[max(uses)] = "head"
    return replace(plan, layouts=layouts)


def _keeps_logits(
    model: nn.Module, objective: Objective, parameters: Mapping[str, nn.Parameter], plan: Plan, sample: Sample
) -> bool:
    batch = objective.collate(model, [sample] * 2)
    targets = batch.targets != IGNORE
    with torch.no_grad():
        plain = model(**batch.inputs).logits[targets]
    try:
        capture = _Capture(BatchedSquares(model, objective, parameters, plan), batch)
        logits = capture.forward().detach()
    except _UNSUITED:
        return False
    logits = logits if plan.head is not None else logits[targets]
    return logits.shape == plain.shape and torch.allclose(logits, plain, rtol=1e-3, atol=1e-4)
