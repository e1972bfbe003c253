"""The diagonal empirical Fisher of a model over a stream of samples."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from guided_dropout.errors import DataError, ModelError
from guided_dropout.fisher.check import checked_plan
from guided_dropout.fisher.coverage import coverage
from guided_dropout.fisher.experts import experts_apart
from guided_dropout.fisher.fast import BatchedSquares, requiring_grad
from guided_dropout.fisher.profile import FisherProfile
from guided_dropout.fisher.reference import sum_of_squares
from guided_dropout.fisher.selection import Choice, select_parameters, without_wrapper
from guided_dropout.identity import model_identity
from guided_dropout.objectives import OBJECTIVES, Objective, Sample, check_samples, detect_objective, has_target
from guided_dropout.provenance import provenance

METHODS = ("batched", "reference")


def estimate_fisher(
    model: nn.Module,
    samples: Iterable[Sample],
    *,
    batch_size: int = 8,
    objective: str = "auto",
    reduction: str = "mean",
    method: str = "batched",
    parameters: Choice = "all",
    progress: Callable[[int], None] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> FisherProfile:
    r"""Estimate :math:`F_j = \frac1N \sum_i (\partial \ell_i / \partial \theta_j)^2` for each parameter of `model`.

    Eq. 3 of Sharma et al. (2024). The result is exact up to rounding: it does not depend on the batch size, on
    the order of the samples or on padding. The model is run in evaluation mode and comes back as it was.

    Args:
        model: a transformers language model with its head.
        samples: any iterable of mappings with 1-D ``input_ids`` and ``labels`` (−100 is no target; a next-token
            model shifts them itself), optionally ``attention_mask``, ``token_type_ids``, ``decoder_*``; any lengths.
        batch_size: samples per forward; only speed and memory depend on it.
        objective: ``"auto"`` finds by running whether the model is a masked LM or predicts the next token; naming
            one makes sure that it is that.
        reduction: a sample's loss is the ``"mean"`` or the ``"sum"`` of the cross-entropy over its targets.
        method: ``"batched"``, or ``"reference"`` for the slow loop that the former is tested against.
        parameters: ``"all"``, ``"trainable"`` (those that require a gradient), ``"base"`` (those that no PEFT adapter
            has brought), or a function (name, parameter) → bool. The others cost nothing.
        progress: called with the number of samples done so far.
        facts: added to the profile's provenance, for instance the text and the seed.

    Returns:
        A `FisherProfile` over the chosen floating-point parameters of ``model.named_parameters()``.

    Raises:
        DataError: no samples, a malformed sample, or none with a target.
        ModelError: the model is no language model, no parameter was chosen, or a sample's loss is not finite.
    """
    if batch_size < 1:
        raise DataError(f"batch size {batch_size}; expected at least 1")
    if method not in METHODS:
        raise DataError(f"method {method!r}; expected one of {', '.join(METHODS)}")
    if objective not in ("auto", *OBJECTIVES):
        raise DataError(f"objective {objective!r}; expected auto, {', '.join(OBJECTIVES)}")
    chosen, outer, model = select_parameters(model, parameters), model, without_wrapper(model)
    stream = check_samples(model, samples)
    first = next(stream, None)
    if first is None:
        raise DataError("there are no samples; expected at least one")
    with _evaluation(model):
        goal = detect_objective(model, first, reduction)
        if objective not in ("auto", goal.name):
            raise ModelError(
                f"{type(model).__name__} computes the {goal.name} loss itself, not {objective}; expected a model for "
                f"{objective}: use --objective {goal.name} or load another head"
            )
        counted = _Targets(goal, itertools.chain([first], stream))
        totals, covered, num = _sum(model, goal, chosen, counted, batch_size, method, progress)
    if num == 0:
        raise DataError(
            f"none of the {counted.skipped} samples has a target; expected labels other than -100: use longer samples"
        )
    diagonal = {n: (t / num).to(torch.float32).cpu() for n, t in totals.items()}
    return FisherProfile(
        diagonal=diagonal,
        tensor_means={n: (t.double().mean() / num).item() for n, t in totals.items()},
        num_samples=num,
        num_skipped=counted.skipped,
        objective=goal.name,
        reduction=reduction,
        model=model_identity(outer),
        coverage=covered,
        provenance=provenance(
            method=method,
            batch_size=batch_size,
            dtype=str(next(iter(chosen.values())).dtype).removeprefix("torch."),
            device=next(iter(chosen.values())).device.type,
            **(facts or {}),
        ),
    )


class _Targets:
    """The samples that have a target; counts the others."""

    def __init__(self, objective: Objective, samples: Iterable[Sample]):
        self.objective, self.samples, self.skipped = objective, samples, 0

    def __iter__(self) -> Iterator[Sample]:
        for s in self.samples:
            if has_target(self.objective, s):
                yield s
            else:
                self.skipped += 1


def _sum(
    model: nn.Module,
    objective: Objective,
    parameters: Mapping[str, nn.Parameter],
    samples: Iterable[Sample],
    batch_size: int,
    method: str,
    progress: Callable[[int], None] | None,
) -> tuple[dict[str, Tensor], dict[str, Any], int]:
    """(name → sum of squares, what the profile says of the coverage, number of samples)."""
    if method == "reference":
        return _sum_by_reference(model, objective, parameters, samples, progress)
    squares, num = None, 0
    for batch in _batches(samples, batch_size):
        if squares is None:
            plan = checked_plan(model, objective, parameters, batch)
            squares = BatchedSquares(model, objective, parameters, plan)
        _check_finite(squares.add(batch).losses, first=num)
        num += len(batch)
        if progress:
            progress(num)
    if squares is None:
        return {}, {}, 0
    totals = {n: squares.totals.total(n) for n in parameters}
    return totals, coverage(parameters, squares.fallback, squares.touched, totals), num


def _sum_by_reference(
    model: nn.Module,
    objective: Objective,
    parameters: Mapping[str, nn.Parameter],
    samples: Iterable[Sample],
    progress: Callable[[int], None] | None,
) -> tuple[dict[str, Tensor], dict[str, Any], int]:
    num = 0

    def counted() -> Iterator[Sample]:
        nonlocal num
        for sample in samples:
            yield sample
            num += 1
            if progress:
                progress(num)

    with requiring_grad(parameters.values()):
        totals = sum_of_squares(model, parameters, counted(), objective)
    return totals, coverage(parameters, dict.fromkeys(parameters, "asked for")), num


def _check_finite(losses: Tensor, *, first: int) -> None:
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        b = int(bad[0])
        raise ModelError(
            f"the loss of sample {first + b} (from 0, of those with a target) is {losses[b].item()}; "
            "expected a finite number: leave the sample out or load the model in float32"
        )


def _batches(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    it = iter(samples)
    while batch := list(itertools.islice(it, size)):
        yield batch


@contextlib.contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no parameter requiring gradients within; everything as it was after."""
    modes = [(m, m.training) for m in model.modules()]
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    cache = getattr(getattr(model, "config", None), "use_cache", None)
    try:
        model.eval()
        for p, _ in wanted:
            p.requires_grad_(False)
        if cache is not None:
            model.config.use_cache = False  # pyright: ignore
        with torch.enable_grad(), experts_apart(model):
            yield
    finally:
        for m, training in modes:
            m.training = training
        for p, flag in wanted:
            p.requires_grad_(flag)
        if cache is not None:
            model.config.use_cache = cache  # pyright: ignore
