"""What comes up where a shortcut through a model does not suit it."""

from __future__ import annotations

# In the forward of a model that does with its parts what was not expected of it.
UNSUITED = (RuntimeError, ValueError, TypeError, IndexError, AttributeError)


class IndirectError(RuntimeError):
    """A model does something with its parts that is not seen from outside of it."""
