r"""A sample's loss, and batches of samples.

The loss of a sample that has one label per token (masked LM, next token, sequence to sequence) is the mean (or the sum)
of the cross-entropy over its targets, in nats; that of a sample that has a single label is the cross-entropy of its
class, or for a regression the squared error, as transformers computes them:

.. math:: \ell_i = \frac{1}{|T_i|}\sum_{t \in T_i} -\log p(y_t \mid x_i), \qquad \ell_i = (f(x_i) - y_i)^2

The labels are the data's, which makes the Fisher the empirical one, or drawn from the model's own prediction, which
makes its mean over draws the true one (Kunstner et al., 2019).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guided_dropout.errors import ModelError
from guided_dropout.samples import IGNORE, INDEX, Sample, as_tensor, check_samples, is_packed

__all__ = [
    "IGNORE",
    "LABELS",
    "OBJECTIVES",
    "PER_SAMPLE",
    "REDUCTIONS",
    "Batch",
    "Objective",
    "Sample",
    "check_samples",
    "has_target",
    "prepare_sample",
]

OBJECTIVES = ("mlm", "causal", "seq2seq", "classification", "regression")
PER_SAMPLE = ("classification", "regression")  # one label per sample; the others have one per token
REDUCTIONS = ("mean", "sum")
LABELS = ("data", "model")

# Elements of the float64 probabilities that are held at a time while labels are drawn: 32 MiB.
_DRAW_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Batch:
    """Padded samples.

    Attributes:
        inputs: what the model is called with; each [B, T] on the model's device.
        targets: [B, T] int64 token that the logits at each position should predict, −100 for none; for next-token
            models it is the labels moved one place to the left, as the models do themselves. [B, 1] for one label per
            sample, int64 class or float64 score.
        weights: like `targets`, float64: what each target's loss counts for, 0 where there is no target.
        indices: the samples' numbers in the stream, where labels are drawn; otherwise empty.
    """

    inputs: dict[str, Tensor]
    targets: Tensor
    weights: Tensor
    indices: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.targets.shape[0]

    @property
    def mask(self) -> Tensor:
        """Bool, like `targets`: where there is a target; M of them are."""
        return self.weights != 0

    def part(self, samples: slice) -> Batch:
        """Some of the samples, without the model's inputs."""
        return Batch({}, self.targets[samples], self.weights[samples], self.indices[samples])

    def at_targets(self, logits: Tensor) -> Tensor:
        """Logits [B, T, V], or [B, C] for one label per sample → [M, V] or [M, C], those that have a target."""
        return logits.reshape(*self.targets.shape, -1)[self.mask]


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, reduction="none")


@dataclass(frozen=True)
class Objective:
    """How a model's logits and a sample's labels become a loss.

    Attributes:
        name: one of `OBJECTIVES`.
        reduction: ``"mean"`` or ``"sum"`` over a sample's targets.
        labels: ``"data"``, or ``"model"``: targets are drawn from the model's prediction wherever the data has one.
        seed: of these draws.
        masks_decoder_padding: the decoder does not see padding among its inputs, which stands there for a label of
            −100: some models mask it by themselves.
    """

    name: str
    reduction: str = "mean"
    labels: str = "data"
    seed: int = 0
    masks_decoder_padding: bool = False

    def targets(self, labels: Tensor) -> Tensor:
        """One sample's labels [T] or [] → the target of the logits at each position [T], or [1]."""
        if self.name in PER_SAMPLE:
            return labels[None].double() if self.name == "regression" else labels[None]
        return F.pad(labels[1:], (0, 1), value=IGNORE) if self.name == "causal" else labels

    def collate(self, model: nn.Module, samples: Sequence[Sample]) -> Batch:
        """Pad samples on the right into one batch on the model's device.

        One with several texts packed into it stands beside others of its own length only, of which none has a mask.
        """
        device = next(model.parameters()).device
        prepared = [prepare_sample(model, self, s) for s in samples]
        targets = _pad([self.targets(p["labels"]) for p in prepared], IGNORE).to(device)
        names = [k for k in prepared[0] if k != "labels" and all(k in p for p in prepared)]
        inputs = {k: _pad([p[k] for p in prepared], pad_value(model, k)).to(device) for k in names}
        mask = torch.ones_like(targets, dtype=torch.bool) if self.name == "regression" else targets != IGNORE
        weights = mask.double()  # a third in float32 would cost a float64 model half of its digits
        if self.reduction == "mean":
            weights = weights / weights.sum(1, keepdim=True).clamp(min=1)
        indices = tuple(s[INDEX] for s in samples) if self.labels == "model" else ()
        return Batch(inputs, targets, weights, indices)

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """Logits [B, T, V] or [B, C] → one loss per sample [B], in the logits' precision."""
        parts = self.target_losses(batch.at_targets(logits), batch)
        return parts.new_zeros(batch.targets.shape).masked_scatter(batch.mask, parts).sum(1)

    def target_losses(
        self, logits: Tensor, batch: Batch, cross_entropy: Callable[[Tensor, Tensor], Tensor] = _cross_entropy
    ) -> Tensor:
        """Logits [M, V] of the targets alone → each target's part of its sample's loss [M].

        `cross_entropy` takes logits [M, V] and targets [M], and may be one that saves memory.
        """
        targets = self.draw(logits, batch) if self.labels == "model" else batch.targets[batch.mask]
        if self.name == "regression":
            losses = (logits[:, 0] - targets.to(logits.dtype)).square()
        else:
            losses = cross_entropy(logits, targets)
        return losses * batch.weights[batch.mask].to(losses.dtype)

    def draw(self, logits: Tensor, batch: Batch) -> Tensor:
        r"""Draw each target from what the model predicts there.

        The random number is a function of (seed, sample index, target position) alone and goes through the inverse of
        the distribution function in float64, so that samples batched in another way get the same labels (where rounding
        moves the logits, a draw on the very edge between two classes may fall on the other side).

        Args:
            logits: [M, V] of the targets alone.
            batch: which targets these are.

        Returns:
            [M] int64 classes from the softmax; for a regression float64 scores from :math:`N(f(x), 1/2)`, of which the
            squared error is the negative log-likelihood up to a constant.
        """
        width = batch.targets.shape[1]
        numbers = np.stack([np.random.default_rng([self.seed, 2, i]).random(width) for i in batch.indices])
        uniform = torch.from_numpy(numbers).to(logits.device)[batch.mask]
        logits = logits.detach()
        if self.name == "regression":
            return logits[:, 0].double() + math.sqrt(0.5) * torch.special.ndtri(uniform)
        drawn = []
        rows = max(1, _DRAW_AT_ONCE // logits.shape[1])
        for some, u in zip(logits.split(rows), uniform.split(rows), strict=True):
            cumulated = some.double().softmax(-1).cumsum(-1)
            drawn.append(torch.searchsorted(cumulated, u[:, None] * cumulated[:, -1:], right=True)[:, 0])
        return torch.cat(drawn).clamp(max=logits.shape[1] - 1)


def has_target(objective: Objective, sample: Sample) -> bool:
    """Whether a sample has anything to predict; one that has not takes no part in a Fisher."""
    if objective.name == "regression":
        return True
    return bool((objective.targets(as_tensor("labels", sample["labels"])) != IGNORE).any())


def prepare_sample(model: nn.Module, objective: Objective, sample: Sample) -> dict[str, Tensor]:
    """One sample as int64 tensors [T] with everything that `model` needs, unpadded."""
    out = {name: as_tensor(name, value) for name, value in sample.items() if name != INDEX}
    accepted = inspect.signature(model.forward).parameters
    if "attention_mask" in accepted and not is_packed(out):
        out.setdefault("attention_mask", torch.ones_like(out["input_ids"]))
    if objective.name == "seq2seq":
        if "decoder_input_ids" not in out:
            out["decoder_input_ids"] = _decoder_inputs(model, out["labels"])
        if "decoder_attention_mask" in accepted and "decoder_attention_mask" not in out:
            ids, padding = out["decoder_input_ids"], padding_token(model)
            masked = objective.masks_decoder_padding and padding is not None
            out["decoder_attention_mask"] = (ids != padding).long() if masked else torch.ones_like(ids)
    return out


def _decoder_inputs(model: Any, labels: Tensor) -> Tensor:
    """What a decoder reads that should say `labels` [T]: the start token, then all but the last, with padding for −100.

    As the model makes them where it says how; otherwise as they mostly are, which `detection` compares with its own.
    """
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is not None:
        return shift(labels=labels[None])[0]
    start, padding = getattr(model.config, "decoder_start_token_id", None), padding_token(model)
    if start is None or padding is None:
        raise ModelError(
            f"{type(model).__name__} has no {'decoder_start_token_id' if start is None else 'pad_token_id'} to make "
            "its decoder's inputs from labels; expected both: set it in the model's config, or give decoder_input_ids"
        )
    moved = F.pad(labels[:-1], (1, 0), value=start)
    return moved.masked_fill(moved == IGNORE, padding)


def padding_token(model: nn.Module) -> int | None:
    """The token that stands for nothing; None where there is none."""
    token = getattr(getattr(model, "config", None), "pad_token_id", None)
    return token if isinstance(token, int) and token >= 0 else None  # some configurations say -1 for none


def pad_value(model: nn.Module, name: str) -> int:
    """What fills `name` beyond a sample's end; masked out, so that it never counts."""
    return (padding_token(model) or 0) if name.endswith("input_ids") else 0


def _pad(rows: Sequence[Tensor], value: int) -> Tensor:
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
