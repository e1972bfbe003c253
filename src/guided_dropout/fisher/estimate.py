"""The diagonal empirical Fisher of a model over a stream of samples."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from guided_dropout.attention import plain_experts
from guided_dropout.detection import NotFiniteError, detect_objective
from guided_dropout.devices import has_float64
from guided_dropout.errors import DataError, ModelError
from guided_dropout.fisher.accumulate import Accumulator
from guided_dropout.fisher.checkpoint import Checkpoint, check_unused, remove_checkpoint, weights_fingerprint
from guided_dropout.fisher.coverage import coverage, untouched
from guided_dropout.fisher.lengths import goes_by_longest
from guided_dropout.fisher.prefixes import Prefixes
from guided_dropout.fisher.processes import Processes, current_processes
from guided_dropout.fisher.profile import FisherProfile
from guided_dropout.fisher.rounds import BatchMeans, RankedRun
from guided_dropout.fisher.run import Run
from guided_dropout.fisher.selection import Choice, select_parameters, without_wrapper
from guided_dropout.fisher.site_scores import StoppingRule
from guided_dropout.fisher.stream import Stream, batches
from guided_dropout.identity import model_identity, model_record, weights_identity
from guided_dropout.likelihood import terms_left_out
from guided_dropout.objectives import OBJECTIVES, Objective, Sample, check_samples
from guided_dropout.provenance import provenance
from guided_dropout.undisturbed import evaluating, has_divided_weights, own_precision, unwritten

CHECKPOINT_EVERY = 300.0
# Of so many samples one must have a finite loss: the objective is found on it.
_FIRST = 16


def estimate_fisher(
    model: nn.Module,
    samples: Iterable[Sample],
    *,
    batch_size: int = 8,
    tokens_per_batch: int | None = None,
    objective: str = "auto",
    reduction: str = "mean",
    labels: str = "data",
    seed: int = 0,
    method: str = "batched",
    scores_only: bool = False,
    until_ranked: StoppingRule | None = None,
    parameters: Choice = "all",
    nonfinite: str = "error",
    checkpoint: str | Path | None = None,
    checkpoint_every: float = CHECKPOINT_EVERY,
    resume: bool | None = None,
    distributed: bool = False,
    progress: Callable[[int], Any] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> FisherProfile:
    r"""Estimate :math:`F_j = \frac1N \sum_i (\partial \ell_i / \partial \theta_j)^2` for each parameter of `model`.

    Eq. 3 of Sharma et al. (2024). The result is exact up to rounding: it does not depend on the batch size, on
    the order of the samples, on padding, on the number of processes or on having been interrupted and resumed. The
    model is run in evaluation mode and its own precision (an autocast around the call is off), on whatever devices it
    is, and comes back as it was. Memory does not grow with the number of samples: a bounded number is read ahead and
    grouped by length.

    Args:
        model: a transformers language model with its head, or a sequence classifier.
        samples: any iterable of mappings with 1-D ``input_ids`` and ``labels`` (−100 is no target; a next-token
            model shifts them itself), optionally ``attention_mask``, ``token_type_ids``, ``decoder_*``; any lengths.
            For a classifier ``labels`` is one integer, for a regression one number. ``index``, which is counted where
            it is not given, is the sample's number in the stream.
            It is gone through once; to resume, it must give the same samples again.
        batch_size: samples per forward, 512 at most; only speed and memory depend on it.
        tokens_per_batch: in place of `batch_size`, the most tokens per forward, padding counted: samples × (longest
            input + longest decoder input). A sample that is longer runs alone.
        objective: ``"auto"`` finds by running which loss the model computes (masked LM, next token, sequence to
            sequence, classification, regression); naming one makes sure that it is that.
        reduction: a sample's loss is the ``"mean"`` or the ``"sum"`` of the losses of its targets: cross-entropy in
            nats, or squared error for a regression.
        labels: ``"data"``: the empirical Fisher; ``"model"``: wherever the data has a target, it is drawn from what the
            model predicts there, a Monte Carlo estimate of the true Fisher.
        seed: of these draws, which depend on it, on the sample's index and on the target's position alone.
        method: ``"batched"``, or ``"reference"`` for the slow loop that the former is tested against.
        parameters: ``"all"``, ``"trainable"`` (those that require a gradient), ``"base"`` (those that no PEFT adapter
            has brought), or a function (name, parameter) → bool. The others cost nothing.
        scores_only: keep only each tensor's mean, which is all that a schedule needs: no memory of the parameters'
            size, and less arithmetic. The profile has no diagonal then.
        until_ranked: stop as soon as this rule (`ranking.RankingTest` or `stability.StabilityTest`) says that the order
            of the sites is settled; what it found stands in the profile's ``provenance["ranking"]``. The samples must
            come in random order. It is told them in that order, also by several processes, which stop at the same one.
        nonfinite: a sample whose loss is NaN or infinite, or whose squared gradients overflow, is an ``"error"`` that
            names it; or ``"skip"``: such samples are left out, and their indices stand in the profile's
            ``coverage["nonfinite"]``.
        checkpoint: folder for the state of an unfinished run, written every `checkpoint_every` seconds and where
            `progress` raises. It stays until it is removed (`fisher.checkpoint.remove_checkpoint`), so that nothing is
            lost before the profile is saved.
        checkpoint_every: seconds; 0 is after each batch.
        resume: True goes on from `checkpoint`, or begins where there is none; False begins afresh and forgets it; None
            begins, and is an error where there is one.
        distributed: share the samples out, by index or with `until_ranked` batch by batch, among the processes that
            ``torchrun`` or ``accelerate launch --multi_gpu`` started. Each must call this with the same model and
            samples, and each gets the profile.
        progress: called with the number of samples done so far, of this process.
        facts: added to the profile's provenance, for instance the text and the seed; a checkpoint with others is
            refused.

    Returns:
        A `FisherProfile` over the chosen floating-point parameters of ``model.named_parameters()``.

    Raises:
        DataError: no samples, a malformed sample, or none with a target; a number out of range.
        ModelError: the model is no language model, parts of it are offloaded or on a device without float64, no
            parameter was chosen, a sample's loss is not finite, it writes to its weights in its forward, or gradients
            are off for good (inference mode).
        ArtefactError: a checkpoint that is of another run or damaged, or that was not expected.
        ProcessError: another of the processes failed.
    """
    world = current_processes() if distributed else Processes()
    chosen, outer, model = select_parameters(model, parameters), model, without_wrapper(model)
    with evaluating(model), unwritten(model), own_precision(model), torch.enable_grad(), plain_experts(model):
        with world.together():
            _check_gradients()
            check_arguments(batch_size, tokens_per_batch, objective)
            check_devices(model)
            if until_ranked is not None and method == "reference":
                raise DataError(
                    "until_ranked with the method 'reference'; expected the batched one: leave one of them out"
                )
            if until_ranked is not None and until_ranked.samples:
                raise DataError(
                    f"a rule to stop by that was told {until_ranked.samples:,} samples before; expected one that was "
                    "told none: make a new one for each estimate"
                )
            if checkpoint is not None and resume is None:
                check_unused(checkpoint)
            goal, checked, unpadded = begin(model, samples, objective, reduction, labels=labels, seed=seed)
            # A rule is told the samples of all, in the order of a single process: whole batches are dealt out.
            share = (world.index, world.count) if until_ranked is None else (0, 1)
            prefixes = Prefixes()
            stream = Stream(goal, prefixes.passing(checked), process=share[0], processes=share[1], unpadded=unpadded)
            means = None if until_ranked is None else BatchMeans(list(chosen))
            sums = Accumulator(
                model,
                goal,
                chosen,
                method=method,
                nonfinite=nonfinite,
                scores_only=scores_only,
                observer=means,
                undoable=means is not None and world.count > 1,
            )
            # What decides the sums or the order in which they are made. Not `nonfinite`: a state holds no such sample,
            # and a run that met one may go on without it.
            identity = {
                "model": model_identity(outer),
                "parameters": len(chosen),
                "weights": weights_fingerprint(outer, chosen),
                "objective": goal.name,
                "reduction": reduction,
                "labels": labels,
                "method": method,
                "scores_only": scores_only,
                "until_ranked": until_ranked and until_ranked.settings(),
                "batch_size": batch_size if tokens_per_batch is None else None,
                "tokens_per_batch": tokens_per_batch,
                "processes": world.count,
                **({"seed": seed} if labels == "model" else {}) | dict(facts or {}),
            }
            place = None
            if checkpoint is not None:
                if resume is False and world.is_main:
                    remove_checkpoint(checkpoint)
                place = Checkpoint(
                    checkpoint, identity, every=checkpoint_every, process=world.index, processes=world.count
                )
            drawn = batches(
                stream,
                batch_size=batch_size,
                tokens_per_batch=tokens_per_batch,
                in_order=until_ranked is not None,  # by length the first samples would be no random ones
            )
            if until_ranked is None or means is None:
                run = Run(sums, drawn, place, progress)
            else:
                run = RankedRun(sums, drawn, means, until_ranked, stream, world, place, progress)
            if place is not None and resume and (state := place.read()):
                run.resume(state)
        world.check_same(identity)
        if isinstance(run, RankedRun):
            run.run()
            skipped = run.skipped if world.is_main else 0
        else:
            world.in_step(run.steps())
            skipped = stream.skipped
    return profile_of(
        outer,
        goal,
        sums,
        skipped,
        world,
        method=method,
        batch_size=batch_size if tokens_per_batch is None else None,
        tokens_per_batch=tokens_per_batch,
        sample_digests=prefixes.facts(until_ranked.samples if until_ranked else None),
        **({"seed": seed} if labels == "model" else {})
        | ({"ranking": until_ranked.report()} if until_ranked else {})
        | dict(facts or {}),
    )


def _check_gradients() -> None:
    # Unlike no_grad, it is not undone by enable_grad.
    if torch.is_inference_mode_enabled():
        raise ModelError(
            "found torch.inference_mode, in which there are no gradients; expected to be outside of it: call "
            "estimate_fisher after the block, or use torch.no_grad in its place"
        )


def check_arguments(batch_size: int, tokens_per_batch: int | None, objective: str) -> None:
    """Refuse what no measurement can go by.

    Raises:
        DataError: a batch of less than 1, or an unknown objective.
    """
    if batch_size < 1:
        raise DataError(f"batch size {batch_size}; expected at least 1")
    if tokens_per_batch is not None and tokens_per_batch < 1:
        raise DataError(f"tokens per batch {tokens_per_batch}; expected at least 1")
    if objective not in ("auto", *OBJECTIVES):
        raise DataError(f"objective {objective!r}; expected auto, {', '.join(OBJECTIVES)}")


def check_devices(model: nn.Module) -> None:
    """Refuse weights that are elsewhere, and devices on which there can be no sums.

    An offloaded weight is another tensor in each forward: its gradient could not be told apart, only lost.
    """
    away = [n for n, p in model.named_parameters() if p.is_meta]
    if away:
        raise ModelError(
            f"{len(away)} of the {len(list(model.parameters()))} parameters of {type(model).__name__} are offloaded to "
            f"the CPU or disk, {away[0]} among them; expected all of them on devices that compute: use more or larger "
            "devices, a smaller --dtype, or --device cpu without --device-map"
        )
    for device in sorted({str(p.device) for p in model.parameters()}):
        if not has_float64(device):
            raise ModelError(
                f"{type(model).__name__} is on {device}, which does not compute in float64; expected a device that "
                "does, for the sums: move the model to the CPU"
            )


def begin(
    model: nn.Module, samples: Iterable[Sample], objective: str, reduction: str, *, labels: str, seed: int
) -> tuple[Objective, Iterator[Sample], bool]:
    """The model's objective, all samples, checked when read, and whether none of them may be padded.

    Found on the first sample with a finite loss.
    """
    if seed < 0:
        raise DataError(f"seed {seed}; expected 0 or more")
    if has_divided_weights(model):
        raise ModelError(
            f"{type(model).__name__} has divided its weights for inference (config.rescale_every); expected those of "
            "its checkpoint: load it anew, or run it once in training mode"
        )
    stream = check_samples(model, samples)
    seen: list[Sample] = []
    goal = None
    for sample in itertools.islice(stream, _FIRST):
        seen.append(sample)
        with contextlib.suppress(NotFiniteError):
            goal = detect_objective(model, sample, reduction, labels=labels, seed=seed)
            break
    if not seen:
        raise DataError("there are no samples; expected at least one")
    if goal is None:
        raise ModelError(
            f"{type(model).__name__} computes a loss that is NaN or infinite for each of the first {len(seen)} samples"
            "; expected finite ones: load the model in float32, or check its weights"
        )
    if objective not in ("auto", goal.name):
        raise ModelError(
            f"{type(model).__name__} computes the {goal.name} loss itself, not {objective}; expected a model for "
            f"{objective}: use --objective {goal.name} or load another head"
        )
    return goal, itertools.chain(seen, stream), goes_by_longest(model, goal, seen[-1])


def profile_of(
    model: nn.Module, goal: Objective, sums: Accumulator, skipped: int, world: Processes, **facts: Any
) -> FisherProfile:
    """The mean over the samples of all processes; tensor by tensor, so that only one is in float64 at a time."""
    nums, skips, left_out, fallbacks, noises, kernels = zip(
        *world.gather((sums.num, skipped, sums.nonfinite, sums.fallback, sums.noise, sums.kernels)), strict=True
    )
    num, nonfinite = sum(nums), sorted(itertools.chain(*left_out))
    fallback = {name: reason for found in fallbacks for name, reason in found.items()}
    if num == 0:
        if nonfinite:
            raise ModelError(
                f"none of the {len(nonfinite)} samples with a target has a finite loss and finite squares; expected "
                "some: load the model in float32 or check its weights"
            )
        raise DataError(
            f"none of the {sum(skips)} samples has a target; expected labels other than -100: use longer samples"
        )
    totals = sums.totals()
    diagonal, means, zeros = {}, {}, []
    for name, p in sums.parameters.items():
        mean = world.sum(totals.total(name).double()) / num
        zeros += untouched(name, mean)
        means[name] = mean.sum().item() / max(1, p.numel())
        if not totals.scores_only:
            diagonal[name] = mean.to(torch.float32).cpu()
    devices = {p.device for p in sums.parameters.values()}
    covered = coverage(sums.parameters, fallback, zeros)
    if nonfinite:
        covered["nonfinite"] = nonfinite
    return FisherProfile(
        diagonal=diagonal,
        tensor_means=means,
        num_samples=num,
        num_skipped=sum(skips),
        objective=goal.name,
        reduction=goal.reduction,
        labels=goal.labels,
        model={**model_record(model), **weights_identity(model, [*sums.parameters])},
        coverage=covered,
        noise=sorted(set().union(*noises)),
        shapes={n: tuple(p.shape) for n, p in sums.parameters.items()},
        provenance=provenance(
            dtype=", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in sums.parameters.values()})),
            device=devices.pop().type if len(devices) == 1 else ", ".join(sorted(map(str, devices))),
            kernel=", ".join(sorted(set().union(*kernels))),
            processes=world.count,
            **terms_left_out(model),
            **facts,
        ),
    )
