"""A plan is proved on the first samples, against plain autograd, before it is trusted with the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from guided_dropout.fisher.fast import BatchedSquares
from guided_dropout.fisher.lengths import predicts_from_padding
from guided_dropout.fisher.native import release_memory
from guided_dropout.fisher.places import Plan
from guided_dropout.fisher.plan import make_plan
from guided_dropout.fisher.shortcuts import UNSUITED, Unsuited
from guided_dropout.fisher.totals import Totals
from guided_dropout.fisher.variants import SHORT, longer, pair_with_all_targets, sequences, shortened, turned
from guided_dropout.objectives import PER_SAMPLE, Objective, Sample
from guided_dropout.undisturbed import requiring_grad

# How far the squares' norm may be off: a wrong rule is off by far more, rounding by less.
_TOLERANCE = 1e-2
_TOLERANCE_HALF = 0.25
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

    What differs takes the reference loop. What is computed differently each time it is computed, in a batch or alone,
    has no gradient but rounding noise (attention's key biases, which softmax does not see), and is named in the plan.

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
            plan, fallback = _proved(model, objective, parameters, first, unpadded, SHORT)
            if not fallback:
                return plan
    return _proved(model, objective, parameters, first, unpadded, longest)[0]


def _proved(
    model: nn.Module,
    objective: Objective,
    parameters: Mapping[str, nn.Parameter],
    first: Sequence[Sample],
    unpadded: bool,
    length: int,
) -> tuple[Plan, set[str]]:
    """A plan made on `length` tokens, checked on the first two samples; and what took the loop in the check."""
    short = shortened(objective, first[0], length)
    plan = make_plan(model, objective, parameters, short)
    batches = _batches(objective, first, short, unpadded=unpadded)
    problem = ""
    # Logits that their own backward needs must not be overwritten. Parts as small as can be prove the way in parts.
    for tried in (plan, replace(plan, head=None, late=None, start=None)):
        plan, fast = tried, BatchedSquares(model, objective, parameters, tried, targets_at_once=1)
        try:
            for batch in batches:
                fast.add(batch)
            break
        except torch.OutOfMemoryError:
            raise
        except UNSUITED as e:
            problem = f"the batched pass failed: {e}"
    else:
        return replace(plan, fallback=dict.fromkeys(parameters, problem)), set(parameters)
    norms = _subtract_plain(fast.totals, model, objective, parameters, [s for batch in batches for s in batch])
    half = _computes_in_half(model)
    tolerance = _TOLERANCE_HALF if half else _TOLERANCE
    differences = {n: torch.stack([_norm(t) for t in _slices(fast.totals[n])]).norm().item() for n in parameters}
    off = {n: d for n, d in differences.items() if not d <= tolerance * norms[n]}
    # In half precision both ways round alike, so that noise does not show as a difference between them.
    doubtful = parameters if half else off
    small = {n: parameters[n] for n in doubtful if parameters[n].numel() <= _SMALL}
    noise = _noise(model, objective, small, batches[-1], unpadded=unpadded)
    floor = 1e-9 * max(norms.values())
    wrong = [n for n in off if n not in noise and not off[n] <= tolerance * norms[n] + floor]
    plan = replace(fast.plan, fallback=dict.fromkeys(wrong, "differs from plain autograd"), noise=frozenset(noise))
    return plan, {*wrong, *fast.fallback}


def _computes_in_half(model: nn.Module) -> bool:
    """Whether some of a model is in half precision, to which what is in float32, as PEFT's adapters, is rounded too."""
    return any(p.is_floating_point() and p.dtype.itemsize < 4 for p in model.parameters())


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
) -> dict[str, float]:
    """Subtract from `totals` the squares that plain autograd gives, sample by sample; returns the sum of their norms.

    It goes in slices, so that nothing of a parameter's size is held beside its gradient and the sum.
    """
    norms: dict[str, float] = dict.fromkeys(parameters, 0.0)
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
            loss = objective.losses(model(**batch.inputs).logits, batch).sum()
            if loss.requires_grad:
                loss.backward()
    return norms


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
) -> set[str]:
    """Those of `parameters` whose gradients differ between a sample alone and the same one in a batch, scaled."""
    if not parameters:
        return set()
    alone = [_gradients(model, objective, parameters, [s], of=1)[0] for s in samples]
    # Beside a longer sample these are padded, and times an odd factor each number is rounded in another way.
    longest = max(samples, key=lambda s: len(s["input_ids"]))
    beside = longest if unpadded else longer(longest)
    together = _gradients(model, objective, parameters, [*samples, beside], of=len(samples), scale=0.7)
    found = set()
    share = _NOISE_HALF if _computes_in_half(model) else _NOISE
    for name in parameters:
        pairs = [(a[name], t[name]) for a, t in zip(alone, together, strict=True)]
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
) -> list[dict[str, Tensor]]:
    """For each of the first samples of a batch: name → gradient in float64, from the loss times `scale`."""
    batch = objective.collate(model, samples)
    found = []
    with requiring_grad(parameters.values()):
        losses = scale * objective.losses(model(**batch.inputs).logits, batch)
        for loss in losses[:of]:
            grads = [torch.zeros_like(p) for p in parameters.values()]
            if loss.requires_grad:
                grads = torch.autograd.grad(
                    loss, list(parameters.values()), retain_graph=True, materialize_grads=True
                )  # fmt: skip
            found.append({name: g.double() / scale for name, g in zip(parameters, grads, strict=True)})
    return found


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
