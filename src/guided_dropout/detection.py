"""Which loss a model computes, found by running it."""

from __future__ import annotations

import contextlib
import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guided_dropout.errors import DataError, GuidedDropoutError, ModelError
from guided_dropout.objectives import LABELS, PER_SAMPLE, REDUCTIONS, Objective, padding_token
from guided_dropout.samples import IGNORE, Sample, as_tensor, vocabulary_size
from guided_dropout.undisturbed import evaluating, same_weights

# What a model that does not suit may raise in its forward.
_UNSUITED = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError)
# How far a loss may be from the model's own, by rounding alone; another one, or a term added to it, is further off.
_SAME = {torch.float64: 1e-9, torch.float32: 1e-5}
_SAME_HALF = 1e-3
# Likewise logits, as a share of the largest: a mask may take them through another kernel.
_SAME_LOGITS = {torch.float64: 1e-6, torch.float32: 1e-4}
_SAME_LOGITS_HALF = 0.1


class NotFiniteError(ModelError):
    """The loss of a sample is NaN or infinite, so that one loss cannot be told from another."""


def detect_objective(
    model: nn.Module, sample: Sample, reduction: str = "mean", *, labels: str = "data", seed: int = 0
) -> Objective:
    """Find by running which loss `model` computes itself; it comes back as it was.

    A language model: with or without the shift of next-token models, or sequence to sequence. A model without a
    language-model head that gives one row of logits per sample: a class's cross-entropy or a squared error. What
    `likelihood_alone` leaves out, such as the routers' auxiliary loss, is none of it.

    Args:
        model: on any device.
        sample: one of its samples; ``labels`` may be left out for a language model.
        reduction: see `Objective`.
        labels: see `Objective`.
        seed: see `Objective`.

    Raises:
        DataError: an unknown reduction or kind of labels, or labels of another form than the model's.
        NotFiniteError: the loss of this sample is NaN or infinite.
        ModelError: the model is neither, computes another loss, makes other decoder inputs of labels, or writes to its
            weights.
    """
    if reduction not in REDUCTIONS:
        raise DataError(f"reduction {reduction!r}; expected one of {', '.join(REDUCTIONS)}")
    if labels not in LABELS:
        raise DataError(f"labels from {labels!r}; expected one of {', '.join(LABELS)}")
    with evaluating(model), same_weights(model) as written:
        found = _of_classifier(model, sample) or _of_language_model(model, sample)
    if written:
        raise ModelError(
            f"{type(model).__name__} writes to {len(written)} of its parameters in its forward, {next(iter(written))} "
            "among them; expected weights that stay as they are: switch that off in its configuration"
        )
    one_label = "labels" in sample and as_tensor("labels", sample["labels"]).dim() == 0
    if found.name not in PER_SAMPLE and one_label:
        raise DataError(f"a sample has one label; expected one for each token, as {type(model).__name__} takes them")
    return replace(found, reduction=reduction, labels=labels, seed=seed)


def require_lm_head(model: nn.Module) -> None:
    """Raise ModelError unless `model` gives logits over its vocabulary and takes labels."""
    if not has_lm_head(model):
        raise ModelError(
            f"{type(model).__name__} has no language-model head; expected a masked or causal language model, or a "
            "sequence classifier: load the checkpoint with AutoModelForMaskedLM, AutoModelForCausalLM or "
            "AutoModelForSequenceClassification"
        )


def _takes_labels(model: nn.Module) -> bool:
    parameters = inspect.signature(model.forward).parameters
    return "labels" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())  # which it passes on


def has_lm_head(model: nn.Module) -> bool:
    """Whether `model` gives logits over its vocabulary and takes labels."""
    return _takes_labels(model) and getattr(model, "get_output_embeddings", lambda: None)() is not None


def _of_language_model(model: nn.Module, sample: Sample) -> Objective:
    require_lm_head(model)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return _of_decoder(model, sample)
    ids = as_tensor("input_ids", sample["input_ids"])[:6]
    if len(ids) < 3:  # one or two tokens cannot tell the two apart
        ids = ids.repeat(3)[:3]
    ids = ids.to(next(model.parameters()).device)
    own, found = _losses_as(model, ids)
    if all(_same(loss, own) for loss in found.values()):
        # Equal tokens, as padding on the left, are predicted alike at each place: only unequal ones tell the two apart.
        own, found = _losses_as(model, (ids + torch.arange(len(ids)).to(ids)) % vocabulary_size(model))
    name = min(found, key=lambda n: _distance(found[n], own))
    if not _same(found[name], own):
        raise ModelError(
            f"{type(model).__name__} computes a loss ({own:.4f}) that is neither masked-LM ({found['mlm']:.4f}) "
            f"nor next-token cross-entropy ({found['causal']:.4f}); expected a language model"
        )
    return Objective(name)


def _of_decoder(model: nn.Module, sample: Sample) -> Objective:
    probe = _with_a_gap(model, sample)
    kinds = [Objective("seq2seq", masks_decoder_padding=masks) for masks in (False, True)]
    makes = "an encoder-decoder that makes its decoder's inputs from labels: give decoder_input_ids in each sample"
    with torch.no_grad(), warnings.catch_warnings(), _running(model, "a sample", makes):
        warnings.simplefilter("ignore", FutureWarning)  # that the EncoderDecoderModel of old had another loss
        batches = [kind.collate(model, [probe]) for kind in kinds]
        batch = batches[0]
        inputs = {name: t for name, t in batch.inputs.items() if name in sample or not name.startswith("decoder")}
        own, logits = _outputs(model, inputs, batch.targets)  # it makes its decoder's inputs itself
    _require_finite(model, own)
    ours = _nearest(F.cross_entropy, logits[0], batch.targets[0], own)
    if not _same(ours, own):
        raise ModelError(
            f"{type(model).__name__} computes a loss ({own:.4f}) that is not the cross-entropy of what its "
            f"decoder should say ({ours:.4f}); expected one that is: without label smoothing or a loss of its own"
        )
    with torch.no_grad():
        given = [_outputs(model, b.inputs)[1] for b in batches]
    expected = batch.at_targets(logits)
    apart = [(batch.at_targets(found) - expected).abs().max().nan_to_num(math.inf).item() for found in given]
    nearest, largest = min(apart), expected.abs().max().item()
    if not nearest <= _SAME_LOGITS.get(logits.dtype, _SAME_LOGITS_HALF) * largest:
        raise ModelError(
            f"{type(model).__name__} makes other decoder inputs of labels than start token, labels and padding: its "
            f"logits, up to {largest:.2g}, are {nearest:.2g} apart from those of these; expected the same: give "
            "decoder_input_ids and decoder_attention_mask in each sample"
        )
    return kinds[apart.index(nearest)]


def _with_a_gap(model: nn.Module, sample: Sample) -> Sample:
    """The same with a token to say at each place but the first, in whose stead a decoder reads padding."""
    labels = torch.atleast_1d(as_tensor("labels", sample.get("labels", sample["input_ids"]))).long().clamp(min=0)
    probe = dict(sample)
    if len(labels) < 3 and not any(name.startswith("decoder") for name in sample):
        labels = labels.repeat(3)[:3]
    if len(labels) > 1:
        labels = labels.index_fill(0, torch.tensor(0, device=labels.device), IGNORE)
        if "decoder_input_ids" in sample and (padding := padding_token(model)) is not None:
            ids = as_tensor("decoder_input_ids", sample["decoder_input_ids"])
            probe["decoder_input_ids"] = ids.index_fill(0, torch.tensor(1, device=ids.device), padding)
    return {**probe, "labels": labels}


@contextlib.contextmanager
def _running(model: nn.Module, what: str, expected: str) -> Iterator[None]:
    """Say of a model that does not run within `what` it was given and what is `expected` of it.

    Raises:
        ModelError: it does not run. Errors of this package, and of memory, stay what they are.
    """
    try:
        yield
    except _UNSUITED as e:
        if isinstance(e, GuidedDropoutError | torch.OutOfMemoryError):
            raise
        raise ModelError(
            f"{type(model).__name__} cannot run {what} ({' '.join(str(e).split())}); expected {expected}"
        ) from e


def _outputs(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor | None = None) -> tuple[Any, Tensor]:
    """The loss that a model computes, where it is given labels, and its logits."""
    out = model(**inputs) if labels is None else model(**inputs, labels=labels)
    loss, logits = (getattr(out, name, None) for name in ("loss", "logits"))
    if logits is None or (loss is None and labels is not None):
        raise ModelError(
            f"{type(model).__name__} gives no {'logits' if logits is None else 'loss'} for tokens and labels; expected "
            "a model with a single head: load it with AutoModelForMaskedLM, AutoModelForCausalLM or "
            "AutoModelForSeq2SeqLM"
        )
    return loss, logits


def _losses_as(model: nn.Module, ids: Tensor) -> tuple[Tensor, dict[str, float]]:
    """The model's own loss, and what it would be as that of a masked LM and of a next-token model."""
    with torch.no_grad(), _running(model, "a sample", "a model that runs on tokens: set what it lacks"):
        own, logits = _outputs(model, {"input_ids": ids[None]}, ids[None])
    _require_finite(model, own)
    cross_entropy = partial(F.cross_entropy, ignore_index=IGNORE)
    return own, {
        name: _nearest(cross_entropy, logits[0], Objective(name).targets(ids), own) for name in ("mlm", "causal")
    }


def _of_classifier(model: nn.Module, sample: Sample) -> Objective | None:
    """That of a classification or a regression, or None for a model that gives no row of logits per sample."""
    if has_lm_head(model) or not _takes_labels(model) or "labels" not in sample:
        return None
    value = as_tensor("labels", sample["labels"])
    classifier = "a sequence classifier or a regression of one score, with config.pad_token_id set"
    with _running(model, "two samples with one label each", classifier):
        inputs = Objective("classification").collate(model, [{**sample, "labels": 0}] * 2).inputs
        with torch.no_grad():
            logits = getattr(model(**inputs), "logits", None)
        if logits is None or logits.dim() != 2 or len(logits) != 2:
            return None
        if value.dim():
            raise DataError(
                f"a sample has {len(value)} labels; expected a single number, as {type(model).__name__} takes it"
            )
        classes = logits.shape[1]
        score = value.to(logits) if classes == 1 else value.clamp(min=0).to(logits.device)  # −100 would give no loss
        own = _own_loss(model, inputs, score.expand(2))
        if own is None:
            return None
        _require_finite(model, own)
    one_score = classes == 1
    loss = F.mse_loss if one_score else F.cross_entropy
    expected = _nearest(loss, logits[:, 0] if one_score else logits, score.expand(2), own)
    if not _same(expected, own):
        raise ModelError(
            f"{type(model).__name__} computes a loss ({own:.4f}) that is not the "
            f"{'squared error' if one_score else 'cross-entropy'} ({expected:.4f}) of one label; expected a "
            "classifier of one class, or a regression of one score"
        )
    return Objective("regression" if one_score else "classification")


def _own_loss(model: Any, inputs: dict[str, Tensor], labels: Tensor) -> Tensor | None:
    problem = model.config.problem_type  # which transformers sets on the way
    try:
        with torch.no_grad():
            return getattr(model(**inputs, labels=labels), "loss", None)
    finally:
        model.config.problem_type = problem


def _nearest(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, targets: Tensor, own: Tensor) -> float:
    """The loss in the logits' precision or in float32, whichever is nearer the model's own: some models widen first."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    values = [
        loss(z, targets.to(z.dtype) if targets.is_floating_point() else targets).item()
        for z in (logits, logits.to(wide))
    ]
    return min(values, key=lambda value: _distance(value, own))


def _distance(found: float, own: Tensor) -> float:
    return abs(found - own.item()) if math.isfinite(found) else math.inf


def _same(found: float, own: Tensor) -> bool:
    return _distance(found, own) <= _SAME.get(own.dtype, _SAME_HALF) * max(1.0, abs(own.item()))


def _require_finite(model: nn.Module, own: Tensor) -> None:
    if not own.isfinite():
        raise NotFiniteError(
            f"{type(model).__name__} computes a loss of {own.item()} for a sample; expected a finite one, which "
            "tells what loss it is: load the model in float32, or check its weights"
        )
