"""The loss of the same text, again and again, as the weights change under it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from guided_dropout.detection import detect_objective
from guided_dropout.errors import DataError, ModelError
from guided_dropout.fisher.checkpoint import Digest
from guided_dropout.fisher.lengths import goes_by_longest
from guided_dropout.fisher.places import head_at
from guided_dropout.fisher.shortcuts import Unsuited
from guided_dropout.fisher.stream import Stream, batches
from guided_dropout.objectives import OBJECTIVES, PER_SAMPLE, Batch, Objective, Sample, check_samples
from guided_dropout.undisturbed import evaluating, same_random_states

# The head at the targets only is taken where it leaves the logits as they are, but for rounding.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
# Where more of the places than this are targets there is nothing to save.
_FEW = 0.5


class Evaluation:
    """A model's mean loss over a text; called once per point.

    Samples are sorted by length, collated and put on the model's device once. Where the model allows it, which is found
    by running the first batch both ways, its head runs at the target positions only. A sample's loss is computed in
    float32 at least, and they are added in float64.

    Args:
        model: a language model with its head, or a sequence classifier, on any device.
        samples: as for `fisher.estimate_fisher`; gone through once. Those without a target are left out.
        objective: ``"auto"``, or the name of the one that it must be.
        reduction: a sample's loss is the ``"mean"`` or the ``"sum"`` over its targets.
        batch_size: samples per forward.
        tokens_per_batch: in place of `batch_size`, the most tokens per forward, padding counted.

    Attributes:
        objective: found by running the model.
        num_samples: how many have a target.
        num_skipped: how many have none.
        digest: of the samples: shows that a text is the one that it was.
        head_at_targets: whether the head runs at the targets only.

    Raises:
        DataError: no samples, a malformed one, or none with a target.
        ModelError: the model is neither, or computes another loss.
    """

    def __init__(
        self,
        model: nn.Module,
        samples: Iterable[Sample],
        *,
        objective: str = "auto",
        reduction: str = "mean",
        batch_size: int = 32,
        tokens_per_batch: int | None = None,
    ):
        if batch_size < 1 or (tokens_per_batch is not None and tokens_per_batch < 1):
            raise DataError(f"batch size {batch_size}, tokens per batch {tokens_per_batch}; expected at least 1")
        checked = list(check_samples(model, samples))
        if not checked:
            raise DataError("there are no samples; expected at least one")
        self.model = model
        with evaluating(model), same_random_states(model):
            self.objective = detect_objective(model, checked[0], reduction)
            unpadded = goes_by_longest(model, self.objective, checked[0])
        if objective not in ("auto", self.objective.name):
            raise ModelError(
                f"{type(model).__name__} computes the {self.objective.name} loss itself, not {objective}; expected one "
                f"of auto, {', '.join(OBJECTIVES)} that is the model's: use --objective {self.objective.name}"
            )
        stream = Stream(self.objective, checked, unpadded=unpadded)
        digest, self._batches = Digest(), list[Batch]()
        for items in batches(stream, batch_size=batch_size, tokens_per_batch=tokens_per_batch):
            digest.add(items)
            self._batches.append(self.objective.collate(model, [item.sample for item in items]))
        self.digest, self.num_skipped = str(digest), stream.skipped
        self.num_samples = sum(map(len, self._batches))
        if not self.num_samples:
            raise DataError(
                f"none of the {self.num_skipped} samples has a target; expected labels other than -100: use longer "
                "samples"
            )
        with evaluating(model), same_random_states(model), torch.no_grad():
            self._head = _head_for_targets(model, self.objective, self._batches[0])

    @property
    def head_at_targets(self) -> bool:
        """Whether the head runs at the targets only."""
        return self._head is not None

    @torch.no_grad()
    def __call__(self) -> float:
        """The mean over the samples of each sample's loss, in nats, with the weights as they are.

        The model must be in evaluation mode (`undisturbed.evaluating`); what it may draw at random is the same each
        time.
        """
        with same_random_states(self.model):
            sums = [self.total(batch).double() for batch in self._batches]
        return torch.stack(sums).sum().item() / self.num_samples

    def total(self, batch: Batch) -> Tensor:
        """The sum of a batch's losses, a scalar; differentiable where gradients are enabled."""
        with head_at(self._head, lambda x: x[batch.mask]):
            logits = self.model(**batch.inputs).logits
        at_targets = logits if self._head is not None else batch.at_targets(logits)
        wide = torch.promote_types(at_targets.dtype, torch.float32)
        return self.objective.target_losses(at_targets.to(wide), batch).sum(dtype=torch.float64)

    @property
    def batches(self) -> tuple[Batch, ...]:
        """The collated text."""
        return tuple(self._batches)


def _head_for_targets(model: nn.Module, objective: Objective, batch: Batch) -> nn.Module | None:
    """The module that maps to the vocabulary, if running it at the targets only saves work and changes nothing."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None or objective.name in PER_SAMPLE or batch.mask.float().mean() > _FEW:
        return None
    few = None
    with Unsuited(), head_at(head, lambda x: x[batch.mask]):
        few = model(**batch.inputs).logits
    if few is None:
        return None
    full = batch.at_targets(model(**batch.inputs).logits)
    if few.shape != full.shape:
        return None
    close = _TOLERANCE.get(full.dtype, 2e-2) * full.abs().max().item()
    return head if (few - full).abs().max().item() <= close else None
