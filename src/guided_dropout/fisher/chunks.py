"""A batch's rows in blocks that never span two samples, for the kernels that walk over them on a GPU."""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

_MAX_SPLITS = 8
_TILE = 128


@dataclass(frozen=True)
class Walk:
    """The chunks that programs walk over.

    Attributes:
        chunks: [C, 4] int32: first row, number of rows, whether the sample ends here, sample.
        bounds: [splits + 1] int32; split s owns the chunks ``bounds[s]`` to ``bounds[s+1]``, whole samples.
        block: rows in a chunk at most.
        length: chunks that a sample with rows has on average, rounded up to a power of two.
    """

    chunks: Tensor
    bounds: Tensor
    block: int
    length: int


@functools.lru_cache(maxsize=64)  # the layers of a model share their offsets
def walk_of(offsets: tuple[int, ...], block: int, splits: int, device: torch.device) -> Walk:
    """The walk over the samples that own rows ``offsets[b]`` to ``offsets[b+1]``, at least one row in all."""
    chunks, ends = [], [0]  # ends: how many chunks there are once a sample is done
    for sample, (start, stop) in enumerate(pairwise(offsets)):
        for row in range(start, stop, block):
            chunks.append((row, min(block, stop - row), int(row + block >= stop), sample))
        if stop > start:
            ends.append(len(chunks))
    shares = [ends[bisect_left(ends, len(chunks) * s / splits)] for s in range(splits + 1)]
    length = power_of_two(ceil_div(len(chunks), len(ends) - 1))
    return Walk(_on_device(chunks, device), _on_device(shares, device), block, length)


def _on_device(rows: Sequence[Any], device: torch.device) -> Tensor:
    """As int32, without making the CPU wait for the GPU."""
    tensor = torch.tensor(rows, dtype=torch.int32, device="cpu")
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def block_rows(offsets: Sequence[int], dtype: torch.dtype) -> int:
    """Rows in a chunk: as many as feed the tensor cores well, fewer where all samples are shorter."""
    longest = max(stop - start for start, stop in pairwise(offsets))
    return max(16, min(power_of_two(longest), 32 if dtype == torch.float32 else 64))


def num_splits(m: int, n: int, num_samples: int, device: torch.device) -> int:
    """Programs that share a tile's samples: as few as let a small matrix fill the device to within a quarter."""
    processors = _num_processors(device)
    tiles = ceil_div(m, _TILE) * ceil_div(n, _TILE)
    if tiles >= processors:
        return 1
    most = min(_MAX_SPLITS, num_samples, processors)
    waves = {splits: ceil_div(tiles * splits, processors) / splits for splits in range(1, most + 1)}
    return next(s for s, w in waves.items() if w <= 1.25 * min(waves.values()))


@functools.cache
def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def ceil_div(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)


def power_of_two(x: int) -> int:
    """The smallest that is not below x."""
    return 1 << (x - 1).bit_length()
