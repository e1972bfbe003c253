"""The losses around a model's weights: directions × masks × points, in one call."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from guided_dropout.errors import DataError, unknown
from guided_dropout.fisher.checkpoint import fingerprint
from guided_dropout.fisher.processes import Processes, current_processes
from guided_dropout.fisher.profile import FisherProfile
from guided_dropout.identity import model_identity, model_record
from guided_dropout.landscape.directions import Direction, movable_parameters
from guided_dropout.landscape.grid import Grid
from guided_dropout.landscape.landscape import Landscape
from guided_dropout.landscape.losses import Evaluation
from guided_dropout.landscape.masks import Mask, Masker
from guided_dropout.landscape.rays import Rays, check_given, sharpest
from guided_dropout.landscape.record import Record, check_unused, remove_record
from guided_dropout.landscape.walk import Ray, walk
from guided_dropout.objectives import Sample
from guided_dropout.provenance import provenance
from guided_dropout.unfinished import check_finished

DIRECTIONS = ("gaussian", "hessian")


def loss_landscape(
    model: nn.Module,
    samples: Iterable[Sample],
    *,
    directions: str | Sequence[Direction] = "gaussian",
    masks: Sequence[Mask | str] = ("all",),
    profile: FisherProfile | None = None,
    mask_level: str = "parameter",
    normalise: str = "filter",
    vectors: str = "held",
    dims: int = 2,
    points: int = 25,
    radius: float = 1.0,
    seeds: Sequence[int] = (0,),
    objective: str = "auto",
    reduction: str = "mean",
    batch_size: int = 32,
    tokens_per_batch: int | None = None,
    keep_directions: bool | None = None,
    checkpoint: str | Path | None = None,
    resume: bool | None = None,
    finished: Landscape | None = None,
    distributed: bool = False,
    progress: Callable[[int, int], Any] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Landscape:
    r"""Evaluate :math:`L(\theta^* + \alpha\delta + \beta\eta)` on a line or a square grid around the weights.

    Eq. 5 of Sharma et al. (2024). The model is run in evaluation mode on the same samples at each point and comes back
    bit for bit as it was, also after an exception. A point costs one forward of the samples; writing the weights is one
    pass over them.

    Args:
        model: a transformers language model with its head, or a sequence classifier; on any device, in any precision.
        samples: see `fisher.estimate_fisher`; all are held in memory. What is masked is part of a sample, so that it is
            the same at each point.
        directions: ``"gaussian"``; ``"hessian"``, its sharpest eigenvectors; or one direction for each dimension.
        masks: which parameters move, see `masks.Mask`; the same directions under each.
        profile: a Fisher profile of the model, for top and bottom masks.
        mask_level: ``"parameter"`` or ``"tensor"``, see `masks.Masker`.
        normalise: of Gaussian directions, see `directions.gaussian_direction`.
        vectors: ``"held"`` or ``"moved"``; see there.
        dims: 1 for a line, 2 for a plane.
        points: along each axis, odd.
        radius: the largest coordinate.
        seeds: of Gaussian directions and random masks; each gives a line or plane of its own. Five or more make
            intervals.
        objective: ``"auto"``, or the name of the one that it must be.
        reduction: a sample's loss is the ``"mean"`` or the ``"sum"`` over its targets.
        batch_size: samples per forward; only speed, memory and rounding depend on it.
        tokens_per_batch: in place of `batch_size`, the most tokens per forward, padding counted.
        keep_directions: whether to return the unmasked directions. None keeps those that no seed gives again.
        checkpoint: folder for the points of an unfinished run; it stays until it is removed (`record.remove_record`).
        resume: True goes on from `checkpoint`, or begins where there is none; False begins afresh and forgets it; None
            begins, and is an error where there is one.
        finished: what an earlier call of this function gave: of the same run it is given back, and nothing is measured.
            Of several processes the first one's counts.
        distributed: share the points out among the processes that ``torchrun`` or ``accelerate launch --multi_gpu``
            started. Each must call this with the same model and samples, and each gets the landscape.
        progress: called with the points done and the points to do, of this process. What it raises ends the run; what
            was done is in `checkpoint`.
        facts: added to the provenance, for instance the text; a checkpoint with others is refused.

    Returns:
        The `Landscape`.

    Raises:
        DataError: an option out of range, no samples or a malformed one.
        ModelError: the model computes no known loss, or parts of it are offloaded.
        ArtefactError: a mask without a fitting profile; a checkpoint of another run, or one that was not expected; what
            was finished is of another run.
        ProcessError: another of the processes failed.
    """
    world = current_processes() if distributed else Processes()
    with world.together():
        grid, chosen = Grid(dims, points, radius), _masks(masks)
        recipe = _recipe(directions, dims, normalise, vectors, mask_level)
        drawn = directions == "gaussian" or (not isinstance(directions, str) and len(directions) < dims)
        _check_seeds(seeds, chosen, drawn=drawn)
        if checkpoint is not None:
            if resume is None:
                check_unused(checkpoint)
            if resume is False and world.is_main:
                remove_record(checkpoint)
        masker = Masker(model, profile, level=mask_level)
        for mask in chosen:
            masker.check(mask)
        evaluation = Evaluation(
            model,
            samples,
            objective=objective,
            reduction=reduction,
            batch_size=batch_size,
            tokens_per_batch=tokens_per_batch,
        )
        basis = {
            "model": model_identity(model),
            "weights": fingerprint(movable_parameters(model)),
            "samples": evaluation.digest,
            "objective": evaluation.objective.name,
            "reduction": reduction,
            "batch_size": batch_size if tokens_per_batch is None else None,
            "tokens_per_batch": tokens_per_batch,
            "directions": recipe,
        }
        run = {
            **basis,
            "masks": [mask.name for mask in chosen],
            "profile": None if profile is None else _print_of(profile),
            "seeds": list(seeds),
            "grid": {"dims": dims, "points": points, "radius": radius},
            **dict(facts or {}),
        }
        if finished is not None:
            _check_finished(finished, run, keep_directions)
    world.check_same(run)
    if (there := world.gather(finished)[0]) is not None:
        return there
    with world.together():
        record = Record(
            len(chosen) * len(seeds),
            len(grid.coordinates),
            dims,
            folder=checkpoint,
            run=run,
            process=world.index,
            processes=world.count,
        )
        if resume:
            record.read()
        given: list[Direction] = []
        if directions == "hessian":
            given = sharpest(
                evaluation, dims, vectors, folder=checkpoint, of=basis, resume=resume is True, world=world
            )  # fmt: skip
        elif not isinstance(directions, str):
            given = check_given(model, directions, dims)
    made = Rays(model, masker, given, dims, normalise=normalise, vectors=vectors)
    rays: list[Ray] = [partial(made.masked, mask, seed) for mask, seed in itertools.product(chosen, seeds)]
    walk(evaluation, rays, grid.coordinates, record, world=world, progress=progress)
    keep = directions == "hessian" if keep_directions is None else keep_directions
    shape = (len(chosen), len(seeds), -1)
    return Landscape(
        losses=record.losses.numpy().reshape(shape),
        lengths=record.lengths.numpy().reshape(shape),
        moved=record.moved.numpy().reshape(shape[:2]),
        masks=tuple(chosen),
        seeds=tuple(seeds),
        grid=grid,
        directions={**recipe, "axes": [{k: v for k, v in d.facts.items() if k != "of"} for d in given]},
        objective=evaluation.objective.name,
        reduction=reduction,
        num_samples=evaluation.num_samples,
        model=model_record(model),
        provenance=provenance(
            device=next(model.parameters()).device.type,
            dtype=", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})),
            processes=world.count,
            batch_size=run["batch_size"],
            tokens_per_batch=tokens_per_batch,
            head_at_targets=evaluation.head_at_targets,
            skipped=evaluation.num_skipped,
            samples_digest=evaluation.digest,
            profile=None if profile is None else {**_source(profile), "fingerprint": run["profile"]},
            run=run,
            **dict(facts or {}),
        ),
        kept={(seed, axis): d for seed in seeds for axis, d in enumerate(made.full(seed))} if keep else {},
    )


def _check_finished(finished: Landscape, run: Mapping[str, Any], keep: bool | None) -> None:
    there, here = dict(finished.provenance.get("run", {})), dict(run)
    if keep:
        there["keep_directions"], here["keep_directions"] = bool(finished.kept), True
    check_finished("what is finished is the landscape", there, here)


def _source(profile: FisherProfile) -> dict[str, Any]:
    return {"samples": profile.num_samples, **{k: profile.provenance.get(k) for k in ("text", "seed", "date")}}


def _masks(masks: Sequence[Mask | str]) -> list[Mask]:
    chosen = [mask if isinstance(mask, Mask) else Mask.parse(mask) for mask in masks]
    names = [mask.name for mask in chosen]
    if not chosen:
        raise DataError("no masks; expected at least one, for instance all")
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"mask {twice[0]} twice; expected it once: leave one out")
    return chosen


def _check_seeds(seeds: Sequence[int], masks: Sequence[Mask], *, drawn: bool) -> None:
    if not seeds or min(seeds) < 0 or len({*seeds}) < len(seeds):
        raise DataError(f"seeds {list(seeds)}; expected different numbers, 0 or more, at least one")
    if len(seeds) > 1 and not drawn and all(mask.kind != "random" for mask in masks):
        raise DataError(
            f"{len(seeds)} seeds, and neither directions nor masks that are drawn: all would be the same; expected one "
            "seed"
        )


def _recipe(
    directions: str | Sequence[Direction], dims: int, normalise: str, vectors: str, mask_level: str
) -> dict[str, Any]:
    """What the directions are made from."""
    recipe: dict[str, Any] = {"vectors": vectors, "mask_level": mask_level}
    if isinstance(directions, str):
        if directions not in DIRECTIONS:
            raise DataError(unknown("directions", directions, DIRECTIONS))
        return {"kind": directions, **recipe, **({"normalise": normalise} if directions == "gaussian" else {})}
    kinds = [str(d.facts.get("kind", "given")) for d in directions]
    drawn = {"normalise": normalise} if len(kinds) < dims else {}
    return {
        "kind": ", ".join(kinds + ["gaussian"] * (dims - len(kinds))),
        **recipe,
        **drawn,
        "fingerprints": [fingerprint(d.tensors) for d in directions],
    }


def _print_of(profile: FisherProfile) -> str:
    """Of the values by which a profile ranks."""
    means = torch.tensor(list(profile.tensor_means.values()), dtype=torch.float64)
    return fingerprint({", ".join(profile.tensor_means): means, **profile.diagonal})
