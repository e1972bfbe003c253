"""Which loss a model computes, found by running it."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guided_dropout.errors import DataError, GuidedDropoutError, ModelError
from guided_dropout.objectives import LABELS, PER_SAMPLE, REDUCTIONS, Objective
from guided_dropout.samples import IGNORE, Sample, as_tensor, vocabulary_size
from guided_dropout.undisturbed import evaluating, same_weights

# What a model that does not suit may raise in its forward.
_UNSUITED = (RuntimeError, ValueError, TypeError, IndexError)


class NotFiniteError(ModelError):
    """The loss of a sample is NaN or infinite, so that one loss cannot be told from another."""


def detect_objective(
    model: nn.Module, sample: Sample, reduction: str = "mean", *, labels: str = "data", seed: int = 0
) -> Objective:
    """Find by running which loss `model` computes itself; it comes back as it was.

    A language model: with or without the shift of next-token models, or sequence to sequence. A model without a
    language-model head that gives one row of logits per sample: a class's cross-entropy or a squared error.

    Args:
        model: on any device.
        sample: one of its samples; ``labels`` may be left out for a language model.
        reduction: see `Objective`.
        labels: see `Objective`.
        seed: see `Objective`.

    Raises:
        DataError: an unknown reduction or kind of labels, or labels of another form than the model's.
        NotFiniteError: the loss of this sample is NaN or infinite.
        ModelError: the model is neither, computes another loss, or writes to its weights.
    """
    if reduction not in REDUCTIONS:
        raise DataError(f"reduction {reduction!r}; expected one of {', '.join(REDUCTIONS)}")
    if labels not in LABELS:
        raise DataError(f"labels from {labels!r}; expected one of {', '.join(LABELS)}")
    with evaluating(model), same_weights(model) as written:
        name = _of_classifier(model, sample) or _of_language_model(model, sample)
    if written:
        raise ModelError(
            f"{type(model).__name__} writes to {len(written)} of its parameters in its forward, {next(iter(written))} "
            "among them; expected weights that stay as they are: switch that off in its configuration"
        )
    one_label = "labels" in sample and as_tensor("labels", sample["labels"]).dim() == 0
    if name not in PER_SAMPLE and one_label:
        raise DataError(f"a sample has one label; expected one for each token, as {type(model).__name__} takes them")
    return Objective(name, reduction, labels, seed)


def require_lm_head(model: nn.Module) -> None:
    """Raise ModelError unless `model` gives logits over its vocabulary and takes labels."""
    if not has_lm_head(model):
        raise ModelError(
            f"{type(model).__name__} has no language-model head; expected a masked or causal language model, or a "
            "sequence classifier: load the checkpoint with AutoModelForMaskedLM, AutoModelForCausalLM or "
            "AutoModelForSequenceClassification"
        )


def _takes_labels(model: nn.Module) -> bool:
    return "labels" in inspect.signature(model.forward).parameters


def has_lm_head(model: nn.Module) -> bool:
    """Whether `model` gives logits over its vocabulary and takes labels."""
    return _takes_labels(model) and getattr(model, "get_output_embeddings", lambda: None)() is not None


def _of_language_model(model: nn.Module, sample: Sample) -> str:
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
    return name


def _of_decoder(model: nn.Module, sample: Sample) -> str:
    objective = Objective("seq2seq")
    labels = as_tensor("labels", sample.get("labels", sample["input_ids"])).clamp(min=0)
    batch = objective.collate(model, [{**sample, "labels": labels}])
    inputs = {name: t for name, t in batch.inputs.items() if name in sample or not name.startswith("decoder")}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # that the EncoderDecoderModel of old had another loss
        out = model(**inputs, labels=batch.targets)  # it makes its decoder's inputs itself
    _require_finite(model, out.loss)
    ours = _nearest(F.cross_entropy, out.logits[0], batch.targets[0], out.loss)
    if not _same(ours, out.loss):
        raise ModelError(
            f"{type(model).__name__} computes a loss ({out.loss:.4f}) that is not the cross-entropy of what its "
            f"decoder should say ({ours:.4f}); expected one that is: without label smoothing or a loss of its own"
        )
    return objective.name


def _losses_as(model: nn.Module, ids: Tensor) -> tuple[Tensor, dict[str, float]]:
    """The model's own loss, and what it would be as that of a masked LM and of a next-token model."""
    with torch.no_grad():
        out = model(input_ids=ids[None], labels=ids[None])
    _require_finite(model, out.loss)
    cross_entropy = partial(F.cross_entropy, ignore_index=IGNORE)
    return out.loss, {
        name: _nearest(cross_entropy, out.logits[0], Objective(name).targets(ids), out.loss)
        for name in ("mlm", "causal")
    }


def _of_classifier(model: nn.Module, sample: Sample) -> str | None:
    """``"classification"`` or ``"regression"``, or None for a model that gives no row of logits per sample."""
    if has_lm_head(model) or not _takes_labels(model) or "labels" not in sample:
        return None
    value = as_tensor("labels", sample["labels"])
    try:
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
        _require_finite(model, own)
    except _UNSUITED as e:
        if isinstance(e, GuidedDropoutError):
            raise
        raise ModelError(
            f"{type(model).__name__} cannot run two samples with one label each ({' '.join(str(e).split())}); expected "
            "a sequence classifier or a regression of one score, with config.pad_token_id set"
        ) from e
    one_score = classes == 1
    loss = F.mse_loss if one_score else F.cross_entropy
    expected = _nearest(loss, logits[:, 0] if one_score else logits, score.expand(2), own)
    if not _same(expected, own):
        raise ModelError(
            f"{type(model).__name__} computes a loss ({own:.4f}) that is not the "
            f"{'squared error' if one_score else 'cross-entropy'} ({expected:.4f}) of one label; expected a "
            "classifier of one class, or a regression of one score"
        )
    return "regression" if one_score else "classification"


def _own_loss(model: Any, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    problem = model.config.problem_type  # which transformers sets on the way
    try:
        with torch.no_grad():
            return model(**inputs, labels=labels).loss
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
    return _distance(found, own) <= 1e-3 * max(1.0, abs(own.item()))


def _require_finite(model: nn.Module, own: Tensor) -> None:
    if not own.isfinite():
        raise NotFiniteError(
            f"{type(model).__name__} computes a loss of {own.item()} for a sample; expected a finite one, which "
            "tells what loss it is: load the model in float32, or check its weights"
        )
