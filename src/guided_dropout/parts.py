"""A batch → parts of like lengths, of which less is padding; together they have the whole batch's gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# What another forward and backward pass costs on a CPU, in tokens that the model could have run instead: gradients of
# all weights are added up once more. Both grow with the weights, so that it is much the same for all models. Of a
# six-layer BERT, 24 to 192 could not be told apart.
OVERHEAD = 64


def parts_of_like_lengths(
    inputs: Mapping[str, Any], overhead: int = OVERHEAD
) -> Iterator[tuple[dict[str, Any], float]]:
    """Cut a padded batch by length, where the padding that falls away is worth more than another pass.

    The mean loss of a batch is the sum of its parts' mean losses, each times its share of the examples; so, where
    padding has no part in what a model makes of an example, is the gradient.

    Args:
        inputs: tensors with the examples in their first dimension; those of the shape of ``attention_mask``, [B, T],
            are cut to a part's longest example. Without such a mask, with one that leaves out more than an end, and
            where padding stands on the left, which moves the positions of some models, the batch stays whole.
        overhead: of another part, in tokens.

    Yields:
        A part's inputs and its share of the examples; the shares add up to 1.
    """
    mask = inputs.get("attention_mask")
    if mask is None or mask.dim() != 2 or not _padded_right(mask):
        yield dict(inputs), 1.0
        return
    lengths, order = mask.sum(1).sort(stable=True)
    for start, stop in _cuts(lengths.tolist(), overhead):
        rows, longest = order[start:stop], int(lengths[stop - 1])
        part = {name: _part(value, rows, longest, mask.shape) for name, value in inputs.items()}
        yield part, (stop - start) / len(mask)


def _padded_right(mask: Tensor) -> bool:
    """Whether each example is a first run of positions, at least one: else a cut at its length would lose some."""
    first = torch.arange(mask.shape[1], device=mask.device) < mask.sum(1, keepdim=True)
    return bool(mask[:, 0].all()) and torch.equal(mask.bool(), first)


def _part(value: Any, rows: Tensor, longest: int, padded: torch.Size) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value[rows, :longest] if value.shape[:2] == padded else value[rows]


def _cuts(lengths: Sequence[int], overhead: int) -> list[tuple[int, int]]:
    """The cheapest way to cut examples, shortest first, into runs that are padded to their last."""
    best, previous = [0.0], [0]
    for stop, longest in enumerate(lengths, start=1):
        costs = [best[start] + (stop - start) * longest + overhead for start in range(stop)]
        previous.append(min(range(stop), key=costs.__getitem__))
        best.append(costs[previous[-1]])
    cuts, stop = [], len(lengths)
    while stop:
        cuts.append((previous[stop], stop))
        stop = previous[stop]
    return cuts[::-1]
