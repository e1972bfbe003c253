r"""A sample's loss, and batches of samples.

A *sample* is a mapping of 1-D sequences: ``input_ids`` and ``labels`` (−100 is no target), and where the model takes
them ``attention_mask``, ``token_type_ids`` and ``decoder_*``. Its loss is the mean (or the sum) of the cross-entropy
over its own targets, in nats:

.. math:: \ell_i = \frac{1}{|T_i|}\sum_{t \in T_i} -\log p(y_t \mid x_i)
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guided_dropout.errors import DataError, ModelError

IGNORE = -100
OBJECTIVES = ("mlm", "causal", "seq2seq")
REDUCTIONS = ("mean", "sum")

Sample = Mapping[str, Any]


@dataclass(frozen=True)
class Batch:
    """Padded samples.

    Attributes:
        inputs: what the model is called with; each [B, T] on the model's device.
        targets: [B, T] int64 token that the logits at each position should predict, −100 for none. For next-token
            models it is the labels moved one place to the left, as the models do themselves.
        weights: [B, T] in the logits' precision later on: what each target's cross-entropy counts for.
    """

    inputs: dict[str, Tensor]
    targets: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return self.targets.shape[0]


@dataclass(frozen=True)
class Objective:
    """How a model's logits and a sample's labels become a loss.

    Attributes:
        name: ``"mlm"``, ``"causal"`` or ``"seq2seq"``.
        reduction: ``"mean"`` or ``"sum"`` over a sample's targets.
    """

    name: str
    reduction: str = "mean"

    def targets(self, labels: Tensor) -> Tensor:
        """Labels [..., T] → the token that the logits at each position should predict [..., T]."""
        if self.name != "causal":
            return labels
        return F.pad(labels[..., 1:], (0, 1), value=IGNORE)

    def collate(self, model: nn.Module, samples: Sequence[Sample]) -> Batch:
        """Pad samples on the right into one batch on the model's device."""
        device = next(model.parameters()).device
        prepared = [prepare_sample(model, self, s) for s in samples]
        labels = _pad([p["labels"] for p in prepared], IGNORE).to(device)
        inputs = {
            k: _pad([p[k] for p in prepared], pad_value(model, k)).to(device) for k in prepared[0] if k != "labels"
        }
        targets = self.targets(labels)
        count = (targets != IGNORE).sum(1, keepdim=True).clamp(min=1)
        weights = (targets != IGNORE) / (count if self.reduction == "mean" else torch.ones_like(count))
        return Batch(inputs, targets, weights)

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """Logits [B, T, V] → one loss per sample [B], in the logits' precision."""
        ce = F.cross_entropy(logits.transpose(1, 2), batch.targets, reduction="none", ignore_index=IGNORE)
        return (ce * batch.weights.to(ce.dtype)).sum(1)


def has_target(objective: Objective, sample: Sample) -> bool:
    """Whether a sample has anything to predict; one that has not takes no part in a Fisher."""
    labels = _as_tensor("labels", sample["labels"])
    return bool((objective.targets(labels) != IGNORE).any())


def prepare_sample(model: nn.Module, objective: Objective, sample: Sample) -> dict[str, Tensor]:
    """One sample as 1-D int64 tensors with everything that `model` needs, unpadded."""
    out = {name: _as_tensor(name, value) for name, value in sample.items()}
    accepted = inspect.signature(model.forward).parameters
    unknown = [k for k in out if k not in accepted and k != "labels"]
    if unknown and "input_ids" in accepted:
        raise DataError(
            f"a sample holds {unknown[0]!r}, which {type(model).__name__} does not take; expected some of "
            f"{', '.join(k for k in accepted if k.endswith(('ids', 'mask', 'labels')))}: rename or drop it"
        )
    if "attention_mask" in accepted:
        out.setdefault("attention_mask", torch.ones_like(out["input_ids"]))
    if objective.name == "seq2seq":
        if "decoder_input_ids" not in out:
            shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
            if shift is None:
                raise ModelError(f"{type(model).__name__} makes no decoder inputs from labels: give decoder_input_ids")
            out["decoder_input_ids"] = shift(labels=out["labels"][None])[0]
        if "decoder_attention_mask" in accepted:
            out.setdefault("decoder_attention_mask", torch.ones_like(out["decoder_input_ids"]))
    return out


def pad_value(model: nn.Module, name: str) -> int:
    """What fills `name` beyond a sample's end; masked out, so that it never counts."""
    if name.endswith("input_ids"):
        return getattr(getattr(model, "config", None), "pad_token_id", None) or 0
    return 0


def check_samples(model: nn.Module, samples: Iterable[Sample]) -> Iterator[Sample]:
    """Yield samples after a look at their form; the first bad one is named by its index.

    Raises:
        DataError: a sample that is no mapping, is empty, whose sequences differ in length, that holds other keys than
            the first, or a token beyond the vocabulary.
    """
    vocabulary = _vocabulary(model)
    paired = {"attention_mask", "token_type_ids", "position_ids"}
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        paired.add("labels")
    keys: set[str] = set()
    for i, s in enumerate(samples):
        if not isinstance(s, Mapping) or "input_ids" not in s or "labels" not in s:
            found = sorted(s) if isinstance(s, Mapping) else type(s).__name__
            raise DataError(f"sample {i} holds {found}; expected a mapping with input_ids and labels")
        if len(s["input_ids"]) == 0 or len(s["labels"]) == 0:
            raise DataError(f"sample {i} is empty; expected at least one token and one label: leave it out")
        own = set(s) - {"attention_mask"}  # which is all ones where it is not given
        if own != (keys := keys or own):
            odd = sorted(own ^ keys)[0]
            where = f"sample {i}" if odd in own else "sample 0"
            raise DataError(f"only {where} of samples 0 and {i} holds {odd}; expected the same keys in all samples")
        tensors = {name: _as_tensor(name, value) for name, value in s.items()}
        for name in sorted(paired & set(s)):
            if len(tensors[name]) != len(tensors["input_ids"]):
                raise DataError(
                    f"sample {i} has {len(s[name])} {name} for {len(s['input_ids'])} input_ids; expected as many"
                )
        for name in ("input_ids", "labels"):
            odd_ids = [t for t in tensors[name].tolist() if not 0 <= t < vocabulary and (name, t) != ("labels", IGNORE)]
            if odd_ids:
                raise DataError(
                    f"sample {i} has {odd_ids[0]} in its {name}; expected 0 to {vocabulary - 1}, the vocabulary of "
                    f"{type(model).__name__}, or {IGNORE} for no target: use the model's own tokenizer"
                )
        yield s


def _vocabulary(model: nn.Module) -> int:
    embeddings: Any = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    return embeddings.weight.shape[0]


def detect_objective(model: nn.Module, sample: Sample, reduction: str = "mean") -> Objective:
    """Find by running which loss `model` computes itself: with or without the shift of next-token models.

    Raises:
        ModelError: the model has no language-model head, or computes another loss.
    """
    if reduction not in REDUCTIONS:
        raise DataError(f"reduction {reduction!r}; expected one of {', '.join(REDUCTIONS)}")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        require_lm_head(model)
        return Objective("seq2seq", reduction)
    require_lm_head(model)
    ids = _as_tensor("input_ids", sample["input_ids"])[:16]
    if len(ids) < 3:  # one or two tokens cannot tell the two apart
        ids = ids.repeat(3)[:3]
    ids = ids[None].to(next(model.parameters()).device)
    with torch.no_grad():
        out = model(input_ids=ids, labels=ids)
        own = out.loss.double()
        found = {}
        for name in ("mlm", "causal"):
            target = Objective(name).targets(ids)
            found[name] = F.cross_entropy(out.logits[0].double(), target[0], ignore_index=IGNORE)
    name = min(found, key=lambda n: abs((found[n] - own).item()))
    if abs((found[name] - own).item()) > 1e-3 * max(1.0, abs(own.item())):
        raise ModelError(
            f"{type(model).__name__} computes a loss ({own:.4f}) that is neither masked-LM ({found['mlm']:.4f}) nor "
            f"next-token cross-entropy ({found['causal']:.4f}); expected a language model"
        )
    return Objective(name, reduction)


def require_lm_head(model: nn.Module) -> None:
    """Raise ModelError unless `model` gives logits over its vocabulary and takes labels."""
    accepted = inspect.signature(model.forward).parameters
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if "labels" not in accepted or head is None:
        raise ModelError(
            f"{type(model).__name__} has no language-model head; expected a masked or causal language model: load the "
            "checkpoint with AutoModelForMaskedLM or AutoModelForCausalLM"
        )


def _as_tensor(name: str, value: Any) -> Tensor:
    t = torch.as_tensor(value)
    if t.dim() != 1 or t.is_floating_point():
        raise DataError(f"{name} has shape {list(t.shape)} and dtype {t.dtype}; expected one dimension of integers")
    return t.long()


def _pad(rows: Sequence[Tensor], value: int) -> Tensor:
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
