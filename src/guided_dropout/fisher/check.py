"""A plan is proved on the first samples, against plain autograd, before it is trusted with the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from guided_dropout.fisher.fast import BatchedSquares, requiring_grad
from guided_dropout.fisher.native import release_memory
from guided_dropout.fisher.places import Plan
from guided_dropout.fisher.plan import UNSUITED, make_plan, sequences, turned
from guided_dropout.objectives import IGNORE, PER_SAMPLE, Objective, Sample, has_target

# How far the squares' norm may be off: a wrong rule is off by far more, rounding by less.
_TOLERANCE = {torch.float64: 1e-2, torch.float32: 1e-2}
_TOLERANCE_HALF = 0.25
# Of two computations of a gradient that is rounding noise, this share differs at least; of a true one, far less.
_NOISE = {torch.float64: 0.05, torch.float32: 0.05}
_NOISE_HALF = 0.3
_SMALL = 1 << 16  # tensors up to this size are looked at for noise: biases are, and it costs no memory


def checked_plan(
    model: nn.Module, objective: Objective, parameters: Mapping[str, nn.Parameter], samples: Sequence[Sample]
) -> Plan:
    """A plan whose squares were compared with plain autograd on the first samples.

    What differs takes the reference loop. What is computed differently each time it is computed, in a batch or alone,
    has no gradient but rounding noise (attention's key biases, which softmax does not see), and is named in the plan.
    """
    plan = _checked(model, objective, parameters, samples)
    release_memory()  # with what the check took still held, all that follows would have a higher peak
    return plan


def _checked(
    model: nn.Module, objective: Objective, parameters: Mapping[str, nn.Parameter], samples: Sequence[Sample]
) -> Plan:
    objective = replace(objective, labels="data")  # a label drawn on the edge may differ, and is not what is checked
    few = [shortened(objective, s) for s in (samples[0], samples[1 % len(samples)])]
    # Some models treat batches with and without padding apart: one of each. With a target at each position, so that no
    # row that is given to the wrong sample goes unseen.
    full = [_with_all_targets(s) for s in (few[0], turned(few[0]))]
    if len({len(s["input_ids"]) for s in few}) == 1:
        full[1] = shortened(objective, full[1])
    batches = (few, full)
    plan = make_plan(model, objective, parameters, few[0])
    problem = ""
    for tried in (plan, replace(plan, head=None)):  # logits that their own backward needs must not be overwritten
        plan, fast = tried, BatchedSquares(model, objective, parameters, tried)
        try:
            for batch in batches:
                fast.add(batch)
            break
        except UNSUITED as e:
            problem = f"the batched pass failed: {e}"
    else:
        return replace(plan, fallback=dict.fromkeys(parameters, problem))
    alone = [_Gradients() for _ in few]
    norms: dict[str, float] = dict.fromkeys(parameters, 0.0)
    for gradients, sample in zip((*alone, None, None), (*few, *full), strict=True):

        def compare(name: str, gradient: Tensor, gradients: _Gradients | None = gradients) -> None:
            total = fast.totals[name]
            square = gradient.to(total.dtype).square()
            total.sub_(square)
            norms[name] += square.norm().item()
            if gradients is not None:
                gradients.take(name, gradient)

        with _arriving(parameters, compare):
            batch = objective.collate(model, [sample])
            objective.losses(model(**batch.inputs).logits, batch).sum().backward()
    # Beside a longer sample these are padded, and their rounding takes another course.
    noise = _noise(model, objective, parameters, [*few, max(samples[:2], key=lambda s: len(s["input_ids"]))], alone)
    tolerance = max(_TOLERANCE.get(p.dtype, _TOLERANCE_HALF) for p in parameters.values())
    floor = 1e-9 * max(norms.values())
    wrong = [
        n for n in parameters if n not in noise and not fast.totals[n].norm().item() <= tolerance * norms[n] + floor
    ]
    return replace(plan, fallback=dict.fromkeys(wrong, "differs from plain autograd"), noise=frozenset(noise))


def shortened(objective: Objective, sample: Sample) -> Sample:
    """The sample without its last tokens, if something is left to predict then.

    One with a single label stays whole: some classifiers read an end-of-text token.
    """
    if objective.name in PER_SAMPLE:
        return sample
    length = len(sample["input_ids"])
    cut = max(2, length - 3)
    short = {**sample, **{k: v[:cut] for k, v in sequences(sample).items() if len(v) == length}}
    return short if has_target(objective, short) else sample


def _with_all_targets(sample: Sample) -> Sample:
    labels = torch.as_tensor(sample["labels"])
    if labels.dim() == 0:
        return sample
    return {**sample, "labels": labels.where(labels != IGNORE, labels.max())}


class _Gradients:
    """One sample's gradients of the small tensors."""

    def __init__(self) -> None:
        self.small: dict[str, Tensor] = {}

    def take(self, name: str, gradient: Tensor) -> None:
        if gradient.numel() <= _SMALL:
            self.small[name] = gradient.detach().double()


def _noise(
    model: nn.Module,
    objective: Objective,
    parameters: Mapping[str, nn.Parameter],
    samples: Sequence[Sample],
    alone: Sequence[_Gradients],
) -> set[str]:
    """Names of the tensors whose gradients differ between a sample alone and the same one in a batch."""
    batch = objective.collate(model, samples)
    together = [_Gradients() for _ in alone]
    small = {n: parameters[n] for g in alone for n in g.small}
    if not small:
        return set()
    with requiring_grad(small.values()):
        losses = objective.losses(model(**batch.inputs).logits, batch)
    for b, gradients in enumerate(together):
        with _arriving(small, gradients.take):
            losses[b].backward(retain_graph=b + 1 < len(together))
    found = set()
    for name in small:
        pairs = [(a.small[name], t.small[name]) for a, t in zip(alone, together, strict=True) if name in a.small]
        size = sum(a.norm().item() ** 2 for a, _ in pairs)
        share = _NOISE.get(parameters[name].dtype, _NOISE_HALF)
        if size and sum((a - t).norm().item() ** 2 for a, t in pairs) > share**2 * size:
            found.add(name)
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
