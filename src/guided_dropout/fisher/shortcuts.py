"""What comes up where a shortcut through a model does not suit it."""

from __future__ import annotations

import contextlib
from types import TracebackType

import torch

# In the forward of a model that does with its parts what was not expected of it.
UNSUITED = (RuntimeError, ValueError, TypeError, IndexError, AttributeError)


class Unsuited(contextlib.suppress):
    """Within, a shortcut is tried: that it does not suit ends the block, and a device whose memory is full is told."""

    def __init__(self) -> None:
        super().__init__(*UNSUITED)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> bool:
        # It is a RuntimeError, and says nothing of the model.
        return not isinstance(error, torch.OutOfMemoryError) and bool(super().__exit__(kind, error, at))


class IndirectError(RuntimeError):
    """A model does something with its parts that is not seen from outside of it."""
