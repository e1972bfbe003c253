"""A plan is proved on the first samples, against plain autograd, before it is trusted with the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from guided_dropout.fisher.fast import BatchedSquares
from guided_dropout.fisher.lengths import Rankings, predicts_from_padding
from guided_dropout.fisher.native import release_memory
from guided_dropout.fisher.places import Plan
from guided_dropout.fisher.plan import make_plan
from guided_dropout.fisher.shortcuts import UNSUITED, Unsuited
from guided_dropout.fisher.totals import Totals
from guided_dropout.fisher.variants import SHORT, longer, pair_with_all_targets, sequences, shortened, turned
from guided_dropout.objectives import PER_SAMPLE, Objective, Sample
from guided_dropout.undisturbed import requiring_grad

# How far the squares' norm may be off: what is wrong is off by more, rounding by less. Some models keep parts in
# float32 whatever they are in; AMX keeps 16 bits of what is in float32.
_TOLERANCES = {"double": 1e-5, "single": 1e-3, "half": 0.25}
# How far a loss may be, as a share of it, before padding is avoided, which costs little; before the loop, as above.
_LOSSES = {"double": 1e-6, "single": 1e-5, "half": 0.05}
# Of two computations of a gradient that is rounding noise, this share differs at least; of a true one, far less.
_NOISE = 0.05
_NOISE_HALF = 0.3
_SMALL = 1 << 16  # tensors up to this size are looked at for noise: biases are, and it costs no memory
_SLICE = 1 << 18  # elements


def checked_plan(
    model: nn.Module,
    objective: Objective,
    parameters: Mapping[str, nn.Parameter],
    samples: Sequence[Sample],
    *,
    unpadded: bool = False,
) -> Plan:
    """A plan whose squares were compared with plain autograd on the first samples.

    Where anything differs, it is proved again without the shortcuts; what differs then takes the reference loop. Where
    a sample's loss in a batch is not what it is alone, the plan says that no sample may be padded, and is proved so.
    What is computed differently each time it is computed, in a batch or alone, has no gradient but rounding noise
    (attention's key biases, which softmax does not see), and is named in the plan.

    The plan is made on a few tokens of the first sample and proved on the first two samples as they are. Should any
    parameter need the loop then, it is made and proved once more on as many tokens as the samples have. No sample is
    padded where `unpadded` says that none may be (see `lengths.goes_by_longest`), or one has a target in its padding.
    """
    objective = replace(objective, labels="data")  # a label drawn on the edge may differ, and is not what is checked
    first = [samples[0], samples[1] if len(samples) > 1 else turned(samples[0])]
    unpadded = unpadded or any(predicts_from_padding(objective, sample) for sample in first)
    plan = _checked(model, objective, parameters, first, unpadded)
    release_memory()  # with what the check took still held, all that follows would have a higher peak
    return plan


def _checked(
    model: nn.Module,
    objective: Objective,
    parameters: Mapping[str, nn.Parameter],
    first: Sequence[Sample],
    unpadded: bool,
) -> Plan:
    longest = max(len(t) for s in first for t in sequences(s).values())
    if longest > SHORT + 1:
        with Unsuited():  # a model that does not take so few tokens
            proof = _proved(model, objective, parameters, first, unpadded, SHORT)
            if not proof.looped:
                return proof.plan
    return _proved(model, objective, parameters, first, unpadded, longest).plan


@dataclass(frozen=True)
class _Proof:
    """What the first samples have shown of a plan.

    Attributes:
        plan: the plan, with what differs in its fallback.
        looped: parameters that took the loop in the check.
        alike: whether each sample's loss in a batch is that of the sample alone.
    """

    plan: Plan
    looped: frozenset[str]
    alike: bool


def _proved(
    model: nn.Module,
    objective: Objective,
    parameters: Mapping[str, nn.Parameter],
    first: Sequence[Sample],
    unpadded: bool,
    length: int,
) -> _Proof:
    """A plan made on `length` tokens, checked on the first two samples, with as many of its shortcuts as hold."""
    short = shortened(objective, first[0], length)
    plan = make_plan(model, objective, parameters, short)
    batches = _batches(objective, first, short, unpadded=unpadded)
    found: list[_Proof] = []
    problem = ""
    for tried in _with_fewer_shortcuts(plan):
        try:
            found.append(_proof(model, objective, parameters, tried, batches, unpadded=unpadded))
        except _BatchedPassError as e:
            problem = f"the batched pass failed: {e}"
            continue
        if found[-1].alike and not found[-1].plan.fallback:
            return found[-1]
    if found and not any(proof.alike for proof in found):
        if not unpadded:
            proof = _proved(model, objective, parameters, first, True, length)
            return replace(proof, plan=replace(proof.plan, unpadded=True))
        if _precision(model) != "half":
            found, problem = [], "a sample's loss in a batch is not its loss alone"
    if not found:
        return _Proof(replace(plan, fallback=dict.fromkeys(parameters, problem)), frozenset(parameters), False)
    return min(found, key=lambda proof: (not proof.alike, len(proof.looped)))


def _with_fewer_shortcuts(plan: Plan) -> list[Plan]:
    """The plan, and what it is without the end on targets alone, and without a head of its own."""
    plans = [plan, replace(plan, start=None), replace(plan, head=None, late=None, start=None)]
    return [p for i, p in enumerate(plans) if p not in plans[:i]]


class _BatchedPassError(Exception):
    """A batch does not run as planned."""


def _proof(
    model: nn.Module,
    objective: Objective,
    parameters: Mapping[str, nn.Parameter],
    plan: Plan,
    batches: Sequence[Sequence[Sample]],
    *,
    unpadded: bool,
) -> _Proof:
    """Measure `batches` as planned and by plain autograd.

    Raises:
        _BatchedPassError: they do not run as planned.
    """
    # Logits that their own backward needs must not be overwritten. Parts as small as can be prove the way in parts.
    fast = BatchedSquares(model, objective, parameters, plan, targets_at_once=1)
    try:
        losses = torch.cat([fast.add(batch).losses for batch in batches])
    except torch.OutOfMemoryError:
        raise
    except UNSUITED as e:
        raise _BatchedPassError(e) from e
    samples = [s for batch in batches for s in batch]
    norms, alone, ranks = _subtract_plain(fast.totals, model, objective, parameters, samples)
    alike = _are_alike(model, losses, torch.cat([alone[id(s)] for s in samples]), unpadded=unpadded)
    alike &= unpadded or not ranks
    precision = _precision(model)
    tolerance = _TOLERANCES[precision]
    differences = {n: torch.stack([_norm(t) for t in _slices(fast.totals[n])]).norm().item() for n in parameters}
    off = {n: d for n, d in differences.items() if not d <= tolerance * norms[n]}
    # In half precision both ways round alike, so that noise does not show as a difference between them.
    doubtful = parameters if precision == "half" else off
    small = {n: parameters[n] for n in doubtful if parameters[n].numel() <= _SMALL}
    # Losses that differ are of another function, and so are gradients: what differs in them is no noise.
    noise = _noise(model, objective, small, batches[-1], unpadded=unpadded) if alike else set()
    if noise is None:
        noise, alike = set(), False
    floor = 1e-9 * max(norms.values())
    wrong = [n for n in off if n not in noise and not off[n] <= tolerance * norms[n] + floor]
    plan = replace(fast.plan, fallback=dict.fromkeys(wrong, "differs from plain autograd"), noise=frozenset(noise))
    return _Proof(plan, frozenset([*wrong, *fast.fallback]), alike)


def _are_alike(model: nn.Module, losses: Tensor, others: Tensor, *, unpadded: bool) -> bool:
    """Whether losses are the same up to rounding."""
    precision = _precision(model)
    most = min(_TOLERANCES[precision], _LOSSES["half"]) if unpadded else _LOSSES[precision]
    return bool(((losses - others).abs() <= most * others.abs().clamp(min=1)).all())


def _precision(model: nn.Module) -> str:
    """The least precise of a model's parts, to which what is in float32, as PEFT's adapters, is rounded too."""
    least = min((p.dtype.itemsize for p in model.parameters() if p.is_floating_point()), default=4)
    return "half" if least < 4 else "single" if least < 8 else "double"


def _batches(objective: Objective, first: Sequence[Sample], short: Sample, *, unpadded: bool) -> list[Sequence[Sample]]:
    """Whole samples with padding and without, which some models treat apart, and two short ones.

    The latter, which come last, have a target at each position, so that no row that is given to the wrong sample goes
    unseen.
    """
    if unpadded:
        return [*([s, turned(s)] for s in first), pair_with_all_targets(objective, short, equal=True)]
    are_padded = len({len(s["input_ids"]) for s in first}) > 1
    pair = pair_with_all_targets(objective, short, equal=are_padded)
    if are_padded:
        return [first, [first[0], turned(first[0])], pair]
    if objective.name in PER_SAMPLE:  # see `pair_with_all_targets`
        return [first, pair]
    return [first, [first[0], pair[1]], pair]


def _subtract_plain(
    totals: Totals,
    model: nn.Module,
    objective: Objective,
    parameters: Mapping[str, nn.Parameter],
    samples: Sequence[Sample],
) -> tuple[dict[str, float], dict[int, Tensor], bool]:
    """Subtract from `totals` the squares that plain autograd gives, sample by sample.

    It goes in slices, so that nothing of a parameter's size is held beside its gradient and the sum.

    Returns:
        The sum of their norms, each sample's loss [1] by its `id`, and whether the model ranks a sample's tokens, some
        of which padding would make others (see `lengths.goes_by_longest`).
    """
    norms: dict[str, float] = dict.fromkeys(parameters, 0.0)
    losses: dict[int, Tensor] = {}
    rankings: list[set[int]] = []
    times = Counter(map(id, samples))

    def subtract(name: str, gradient: Tensor) -> None:
        parts = []
        for total, slice_ in zip(_slices(totals[name]), _slices(gradient), strict=True):
            square = slice_.to(total.dtype).square()
            total.sub_(square, alpha=number)
            parts.append(_norm(square))
        norms[name] += number * torch.stack(parts).norm().item()

    for sample in {id(s): s for s in samples}.values():
        number, batch = times[id(sample)], objective.collate(model, [sample])
        with _arriving(parameters, subtract):
            with Rankings() as ranked:
                logits = model(**batch.inputs).logits
            rankings.append(ranked.sizes)
            loss = objective.losses(logits, batch).sum()
            losses[id(sample)] = loss.detach()[None]
            if loss.requires_grad:
                loss.backward()
    return norms, losses, any(sizes != rankings[0] for sizes in rankings)


def _slices(t: Tensor) -> tuple[Tensor, ...]:
    """Along the first dimension, small enough for a cache."""
    t = torch.atleast_1d(t)
    return t.split(max(1, _SLICE * len(t) // max(1, t.numel())))


def _norm(squares: Tensor) -> Tensor:
    """In float64, since the squares of what is noise, squared again, are too small for float32."""
    return torch.linalg.vector_norm(squares, dtype=torch.float64)


def _noise(
    model: nn.Module,
    objective: Objective,
    parameters: Mapping[str, nn.Parameter],
    samples: Sequence[Sample],
    *,
    unpadded: bool,
) -> set[str] | None:
    """Those of `parameters` whose gradients differ between a sample alone and the same one in a batch, scaled.

    None where the losses do.
    """
    if not parameters:
        return set()
    losses, alone = zip(*(_gradients(model, objective, parameters, [s], of=1) for s in samples), strict=True)
    # Beside a longer sample these are padded, and times an odd factor each number is rounded in another way.
    longest = max(samples, key=lambda s: len(s["input_ids"]))
    beside = longest if unpadded else longer(longest)
    theirs, together = _gradients(model, objective, parameters, [*samples, beside], of=len(samples), scale=0.7)
    if not _are_alike(model, theirs, torch.cat(losses), unpadded=unpadded):
        return None
    found = set()
    share = _NOISE_HALF if _precision(model) == "half" else _NOISE
    for name in parameters:
        pairs = [(a[name], t[name]) for (a,), t in zip(alone, together, strict=True)]
        size = sum(a.norm().item() ** 2 for a, _ in pairs)
        if size and sum((a - t).norm().item() ** 2 for a, t in pairs) > share**2 * size:
            found.add(name)
    return found


def _gradients(
    model: nn.Module,
    objective: Objective,
    parameters: Mapping[str, nn.Parameter],
    samples: Sequence[Sample],
    *,
    of: int,
    scale: float = 1.0,
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Of each of the first samples of a batch: its loss; name → gradient in float64, from the loss times `scale`."""
    batch = objective.collate(model, samples)
    found = []
    with requiring_grad(parameters.values()):
        losses = objective.losses(model(**batch.inputs).logits, batch)[:of]
        for loss in scale * losses:
            grads = [torch.zeros_like(p) for p in parameters.values()]
            if loss.requires_grad:
                grads = torch.autograd.grad(
                    loss, list(parameters.values()), retain_graph=True, materialize_grads=True
                )  # fmt: skip
            found.append({name: g.double() / scale for name, g in zip(parameters, grads, strict=True)})
    return losses.detach(), found


@contextmanager
def _arriving(parameters: Mapping[str, nn.Parameter], visit: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Within, each gradient of a backward is shown to `visit` when it is complete, and then dropped.

    So a backward needs no memory for the gradients of all parameters at once.
    """
    kept = {name: p.grad for name, p in parameters.items()}
    handles = []

    def hook(name: str) -> Callable[[Tensor], None]:
        def show(p: Tensor) -> None:
            assert p.grad is not None
            gradient, p.grad = p.grad, None
            visit(name, gradient)

        return show

    try:
        with requiring_grad(parameters.values()):
            for name, p in parameters.items():
                p.grad = None
                handles.append(p.register_post_accumulate_grad_hook(hook(name)))
            yield
    finally:
        for handle in handles:
            handle.remove()
        for name, p in parameters.items():
            p.grad = kept[name]
