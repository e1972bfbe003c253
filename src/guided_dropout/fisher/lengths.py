"""Which samples may share a batch with longer ones: those that padding on the right leaves as they are alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from guided_dropout.fisher.shortcuts import Unsuited
from guided_dropout.fisher.variants import longer, shortened
from guided_dropout.objectives import IGNORE, PER_SAMPLE, Objective, Sample
from guided_dropout.samples import is_packed
from guided_dropout.undisturbed import Parts

# Rotary embeddings that go by the longest sample of a batch, once it is long enough.
_BY_LONGEST = {"longrope", "dynamic"}
# How far logits may be apart, as a share of the largest, by rounding alone.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}
_ROUNDING_HALF = 0.1
_FEW = 4  # tokens, which take next to no time
# What puts scores in an order, and which of its arguments says along which dimension.
_RANKINGS = {"topk": 2, "kthvalue": 2, "sort": 1, "argsort": 1}


def goes_by_longest(model: nn.Module, objective: Objective, sample: Sample) -> bool:
    """Whether a model makes something else of a sample beside a longer one than of the sample alone.

    It does where it looks at padding: FNet has no mask, ConvBERT's convolutions and Funnel's pooling do not go by it;
    where it takes other parts for few tokens, as BigBird does; or where it ranks tokens (sparse attention's indexers),
    since which of equal ones are taken goes by how many there are, for some samples and some lengths only.
    """
    found = [getattr(module, "rope_type", None) for module in model.modules()]
    kinds = [kind for one in found for kind in (one.values() if isinstance(one, dict) else [one])]
    if any(isinstance(kind, str) and kind in _BY_LONGEST for kind in kinds):
        return True
    short, parts, others = shortened(objective, sample, _FEW), Parts(model), list[bool]()
    rankings: list[Rankings] = []

    def logits(*batch: Sample) -> Tensor:
        with Rankings() as seen:
            rankings.append(seen)
            return model(**objective.collate(model, batch).inputs).logits[0]

    # Before they are put back.
    handle = model.register_forward_hook(lambda *_: others.append(not parts.are_there()), prepend=True)
    with torch.no_grad(), Unsuited(), handle:  # some take no batch without a token to pad with
        alone, padded = logits(short), logits(short, longer(short))
        apart = (alone - padded[: len(alone)]).abs().max()
        if apart > _ROUNDING.get(alone.dtype, _ROUNDING_HALF) * alone.abs().max():
            return True
    return any(others) or any(seen.sizes != rankings[0].sizes for seen in rankings)


class Rankings(TorchFunctionMode):
    """Notes among how many each ranking of scores chooses: those of experts are as many for any sample, tokens not."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        place = _RANKINGS.get(getattr(func, "__name__", ""))
        scores = args[0] if args else kwargs.get("input")
        if place is not None and isinstance(scores, Tensor) and scores.is_floating_point() and scores.dim():
            self.sizes.add(scores.shape[kwargs.get("dim", args[place] if len(args) > place else -1)])
        return func(*args, **kwargs)


def predicts_from_padding(objective: Objective, sample: Sample) -> bool:
    """Whether a sample has a target at a position that its own mask leaves out, as its first token after padding has.

    What a model makes of such a position may go by how many there are in the batch. Nor can a sample be padded that has
    no mask, so that the texts in it are kept apart.
    """
    if is_packed(sample):
        return True
    mask = sample.get("decoder_attention_mask" if objective.name == "seq2seq" else "attention_mask")
    if mask is None or objective.name in PER_SAMPLE:
        return False
    targets, mask = objective.targets(torch.as_tensor(sample["labels"])), torch.as_tensor(mask)
    return targets.shape == mask.shape and bool(((targets != IGNORE) & (mask == 0)).any())
