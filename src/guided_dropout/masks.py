"""Dropout's random numbers on a CPU: 16 random bits an element where torch draws a double."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

_STEPS = 1 << 16
_LEAST = 1 / 256
_lock = threading.Lock()
_users = 0
_library: torch.library.Library | None = None


@contextlib.contextmanager
def quick_masks() -> Iterator[None]:
    """Draw each ``bernoulli_(p)`` on a CPU, and with it each dropout mask, by `bernoulli` for the time of a block.

    It goes by the operator, not by a module: the attention's dropout happens within an operation of torch. Blocks in
    several threads may overlap; threads outside of one draw in this way meanwhile.
    """
    global _users, _library
    with _lock:
        _users += 1
        if _users == 1:
            _library = torch.library.Library("aten", "IMPL")
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", category=UserWarning)  # that the operator is overridden, as meant
                _library.impl("bernoulli_.float", bernoulli, "CPU")
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                _library = None  # without a reference the operator is torch's again


def bernoulli(out: Tensor, p: float = 0.5, *, generator: torch.Generator | None = None) -> Tensor:
    """Fill a tensor with ones and zeros in place.

    Args:
        out: of any shape, strides and dtype, on the CPU.
        p: how likely a one is, in [0, 1]; rounded to a multiple of 2^-16 where 1/256 <= p <= 255/256, which changes
            the rarer of the two by a part of 512 at most, and where `p` is a tenth by less than a part of 10,000.
        generator: torch's own by default.

    Returns:
        `out`.

    Raises:
        RuntimeError: `p` is out of range, as torch says it.
    """
    if not 0.0 <= p <= 1.0:
        raise RuntimeError(f"bernoulli_ expects p to be in [0, 1], but got p={p}")
    if min(p, 1.0 - p) < _LEAST:
        ones = torch.empty(out.shape).uniform_(generator=generator) < p
    else:
        # Four numbers of 16 bits, signed, in each word.
        words = torch.empty((out.numel() + 3) // 4, dtype=torch.int64)
        numbers = words.random_(torch.iinfo(torch.int64).min, None, generator=generator).view(torch.int16)
        ones = (numbers[: out.numel()] < round(p * _STEPS) - _STEPS // 2).view(out.shape)
    return out.copy_(ones)
