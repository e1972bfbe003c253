"""Which samples may share a batch with longer ones: those that padding on the right leaves as they are alone."""

from __future__ import annotations

import torch
from torch import nn

from guided_dropout.objectives import IGNORE, PER_SAMPLE, Objective, Sample

# Rotary embeddings that go by the longest sample of a batch.
_BY_LONGEST = {"longrope", "dynamic"}


def goes_by_longest(model: nn.Module) -> bool:
    """Whether a model treats each sample of a batch as its longest one asks for."""
    found = [getattr(module, "rope_type", None) for module in model.modules()]
    kinds = [kind for one in found for kind in (one.values() if isinstance(one, dict) else [one])]
    return any(isinstance(kind, str) and kind in _BY_LONGEST for kind in kinds)


def predicts_from_padding(objective: Objective, sample: Sample) -> bool:
    """Whether a sample has a target at a position that its own mask leaves out, as its first token after padding has.

    What a model makes of such a position may go by how many there are in the batch.
    """
    mask = sample.get("decoder_attention_mask" if objective.name == "seq2seq" else "attention_mask")
    if mask is None or objective.name in PER_SAMPLE:
        return False
    targets, mask = objective.targets(torch.as_tensor(sample["labels"])), torch.as_tensor(mask)
    return targets.shape == mask.shape and bool(((targets != IGNORE) & (mask == 0)).any())
