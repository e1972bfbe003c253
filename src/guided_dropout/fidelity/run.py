"""How little text is enough: the Fisher of sub-samples beside that of all samples, from one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from guided_dropout.attention import plain_experts
from guided_dropout.errors import DataError
from guided_dropout.fidelity import memory
from guided_dropout.fidelity.metrics import METRICS, check_top, compare, largest
from guided_dropout.fidelity.paper import FRACTIONS, TOPS
from guided_dropout.fidelity.result import Cell, Fidelity, Order
from guided_dropout.fidelity.schedules import bootstrap, curve, order_metrics, recommended, sample_scores
from guided_dropout.fidelity.subsamples import Subsamples, draw_subsamples
from guided_dropout.fidelity.sums import SubsampleSums
from guided_dropout.fisher.checkpoint import Checkpoint, check_unused, fingerprint, remove_checkpoint
from guided_dropout.fisher.estimate import CHECKPOINT_EVERY, begin, check_arguments, check_devices, profile_of
from guided_dropout.fisher.prefixes import Prefixes
from guided_dropout.fisher.processes import Processes
from guided_dropout.fisher.profile import FisherProfile
from guided_dropout.fisher.run import Run
from guided_dropout.fisher.selection import select_parameters, without_wrapper
from guided_dropout.fisher.stream import Stream
from guided_dropout.identity import model_identity
from guided_dropout.objectives import Sample
from guided_dropout.schedule.shapes import check_choice
from guided_dropout.sites import GROUPINGS, find_sites
from guided_dropout.undisturbed import evaluating, own_precision, unwritten
from guided_dropout.unfinished import check_finished


def fidelity(
    model: nn.Module,
    samples: Iterable[Sample],
    *,
    fractions: Sequence[float] = FRACTIONS,
    tops: Sequence[float] = TOPS,
    draws: int = 5,
    tau: float = 0.95,
    grouping: str = "owner",
    scores_only: bool = False,
    seed: int = 0,
    batch_size: int = 8,
    tokens_per_batch: int | None = None,
    objective: str = "auto",
    reduction: str = "mean",
    max_memory: int | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: float = CHECKPOINT_EVERY,
    resume: bool | None = None,
    finished: Fidelity | None = None,
    planned: Callable[[int, int], Any] | None = None,
    progress: Callable[[int], Any] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Fidelity:
    """Compare the Fisher of sub-samples of a text, and the schedules that follow, with those of all of it.

    Observation 2 and Table 1 of Sharma et al. (2024), with several draws of each size. Each sample's squares are formed
    once, whatever the number of sub-samples, and each sub-sample's Fisher is what `estimate_fisher` gives for its
    samples alone, up to rounding. The samples themselves are held in memory, as tokens. The model is run in evaluation
    mode and comes back as it was. A sample that is not finite is an error: leave it out.

    Args:
        model: a transformers language model with its head, or a sequence classifier.
        samples: as for `estimate_fisher`.
        fractions: sizes of the sub-samples, as shares of the samples that have a target; nested within a draw.
        tops: the shares of the parameters, those with the largest values, on which values are compared.
        draws: sub-samples of each size.
        tau: Kendall's tau with the whole text's order that a schedule should reach, for `Fidelity.recommended`.
        grouping: which parameters feed a dropout site: ``"owner"`` or ``"dataflow"``.
        scores_only: compare the schedules alone, which needs no memory of the parameters' size.
        seed: of the draws; they depend on the number of samples besides.
        batch_size: as for `estimate_fisher`, as are the next three.
        tokens_per_batch: see there.
        objective: see there.
        reduction: see there.
        max_memory: bytes that the sums may take; by default what the machine has to give.
        checkpoint: folder for the state of an unfinished run, as for `estimate_fisher`.
        checkpoint_every: seconds between two writes of it.
        resume: as for `estimate_fisher`.
        finished: what an earlier call of this function gave: of the same run it is given back, and nothing is measured.
        planned: called before the pass with the number of samples and the bytes of memory that are needed.
        progress: called with the number of samples done so far.
        facts: added to the provenance; a checkpoint with others is refused.

    Raises:
        DataError: numbers out of range, more memory needed than there is, or samples as for `estimate_fisher`.
        ModelError: as for `estimate_fisher`.
        ArtefactError: a checkpoint of another run or damaged, or one that was not expected; what was finished is of
            another run.
    """
    check_arguments(batch_size, tokens_per_batch, objective)
    for top in tops:
        check_top(top)
    if not tops or len(set(tops)) < len(tops):
        raise DataError(f"top shares {', '.join(f'{t:g}' for t in tops) or 'none'}; expected one or more, each once")
    if not 0 < tau <= 1:
        raise DataError(f"tau {tau:g}; expected a number above 0 and up to 1, as 0.95")
    check_choice("grouping", grouping, GROUPINGS)
    if checkpoint is not None and resume is None:
        check_unused(checkpoint)
    sites = [site for site in find_sites(model) if not site.in_head]
    chosen, outer, inner = select_parameters(model), model, without_wrapper(model)
    with evaluating(inner), unwritten(inner), own_precision(inner), torch.enable_grad(), plain_experts(inner):
        check_devices(inner)
        goal, checked, unpadded = begin(inner, samples, objective, reduction, labels="data", seed=seed)
        prefixes = Prefixes()
        stream = Stream(goal, prefixes.passing(checked), unpadded=unpadded)
        items = list(stream)
        if not items:
            raise DataError(
                f"none of the {stream.skipped} samples has a target; expected labels other than -100: use longer "
                "samples"
            )
        subsamples = draw_subsamples(len(items), fractions, draws, seed)
        identity = {
            "model": model_identity(outer),
            "weights": fingerprint(chosen),
            "objective": goal.name,
            "reduction": reduction,
            "fractions": list(subsamples.fractions),
            "draws": draws,
            "seed": seed,
            "scores_only": scores_only,
            "batch_size": batch_size if tokens_per_batch is None else None,
            "tokens_per_batch": tokens_per_batch,
            **dict(facts or {}),
        }
        whole = {**identity, "samples": len(items), "tops": list(tops), "tau": tau, "grouping": grouping}
        if finished is not None:
            check_finished("what is finished is the comparison", finished.provenance.get("run", {}), whole)
            return finished
        needed = 0 if scores_only else _bytes_needed(chosen, subsamples, tops)
        memory.check_memory(needed, max_memory)
        if planned:
            planned(len(items), needed)
        sums = SubsampleSums(inner, goal, chosen, items, subsamples, scores_only=scores_only)
        place = None
        if checkpoint is not None:
            if resume is False:
                remove_checkpoint(checkpoint)
            place = Checkpoint(checkpoint, {**identity, "items": len(items)}, every=checkpoint_every)
        run = Run(sums, sums.ordered(batch_size=batch_size, tokens_per_batch=tokens_per_batch), place, progress)
        if place is not None and resume and (state := place.read()):
            run.resume(state)
        for _ in run.steps():
            pass
    parts = sums.finish() if not scores_only else {}
    how: dict[str, Any] = {
        "batch_size": batch_size if tokens_per_batch is None else None,
        "tokens_per_batch": tokens_per_batch,
    }
    how["sample_digests"] = prefixes.facts()
    profile = profile_of(
        outer, goal, sums.inner, stream.skipped, Processes(), method="batched", **how | dict(facts or {})
    )
    cells = _cells(profile, parts, subsamples, tops)
    parts.clear()
    scores = sample_scores(sums.sample_means(), list(chosen), sites, profile.noise, grouping)
    ordered = len(np.unique(scores.sum(axis=0))) > 1
    found = curve(scores, seed) if ordered else None
    return Fidelity(
        cells=cells,
        orders=_orders(scores, subsamples) if sites else (),
        curve=found,
        bootstrap=bootstrap(scores, seed) if ordered else None,
        recommended=recommended(found, tau) if found else None,
        tau=tau,
        grouping=grouping,
        num_samples=len(items),
        num_skipped=stream.skipped,
        num_parameters=sum(p.numel() for n, p in chosen.items() if n not in profile.noise),
        sites=len(sites),
        fractions=subsamples.fractions,
        tops=tuple(tops),
        draws=draws,
        seed=seed,
        model=profile.model,
        noise=tuple(profile.noise),
        provenance={**profile.provenance, "run": whole},
        profile=profile,
    )


def _bytes_needed(chosen: Mapping[str, nn.Parameter], subsamples: Subsamples, tops: Sequence[float]) -> int:
    element = max(torch.promote_types(p.dtype, torch.float32).itemsize for p in chosen.values())
    size = sum(p.numel() for p in chosen.values())
    return memory.bytes_needed(size, element, subsamples.draws, len(subsamples.sizes), max(tops))


def _cells(
    profile: FisherProfile,
    parts: dict[tuple[int, int], dict[str, torch.Tensor]],
    subsamples: Subsamples,
    tops: Sequence[float],
) -> tuple[Cell, ...]:
    """Each fraction on each share, over the draws; a sub-sample's sums are let go once it is compared."""
    if not parts:
        return ()
    full = largest(profile.diagonal, max(tops), profile.noise)
    cells = []
    for k, (fraction, size) in enumerate(zip(subsamples.fractions, subsamples.sizes, strict=True)):
        by_draw = [compare(full, parts.pop((d, k)), 1 / size, tops, profile.noise) for d in range(subsamples.draws)]
        for top in tops:
            values = {metric: [found[top][metric] for found in by_draw] for metric in METRICS}
            cells.append(Cell(fraction, size, top, values))
    return tuple(cells)


def _orders(scores: np.ndarray, subsamples: Subsamples) -> tuple[Order, ...]:
    full = scores.mean(axis=0)
    orders = []
    for k, (fraction, size) in enumerate(zip(subsamples.fractions, subsamples.sizes, strict=True)):
        by_draw = [order_metrics(full, scores[subsamples.members(d, k)].mean(axis=0)) for d in range(subsamples.draws)]
        orders.append(Order(fraction, size, {name: [found[name] for found in by_draw] for name in by_draw[0]}))
    return tuple(orders)
