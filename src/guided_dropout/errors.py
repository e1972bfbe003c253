"""The errors a user can meet and mend.

``GuidedDropoutError`` (a ``ValueError``) is the root; each message names what was found, what was expected and what to
do. The command line prints it in one line and exits with 2. Anything else that escapes is a bug.

* ``DataError``: text or task data that is missing, empty or malformed (file and line are named).
* ``ModelError``: a model that cannot do what was asked of it (no language-model head, no such folder, …).
  ``NotFiniteError`` is the one of a sample whose loss or squared gradients are not finite.
* ``ArtefactError``: a saved profile, schedule or result that is missing, damaged or of another version; an output
  folder that cannot be written.
* ``ScheduleError``: rates out of range, or a schedule and a model that do not belong together.
* ``SiteError``: a dropout rate that does not arrive where it should.
"""

import difflib
from collections.abc import Iterable


class GuidedDropoutError(ValueError):
    """Root of all errors that a user can mend.

    Attributes:
        told_elsewhere: another process of the same run prints it.
    """

    told_elsewhere = False


class DataError(GuidedDropoutError):
    """Text or task data is missing, empty or malformed."""


class ModelError(GuidedDropoutError):
    """The model cannot do what was asked of it."""


class NotFiniteError(ModelError):
    """A sample's loss or squared gradients are not finite."""


class ArtefactError(GuidedDropoutError):
    """A saved artefact is missing, damaged or of another version, or its folder cannot be written."""


class ScheduleError(GuidedDropoutError):
    """Rates out of range, or a schedule that does not belong to this model."""


class SiteError(GuidedDropoutError):
    """A dropout rate does not arrive where it should."""


def describe(value: object) -> str:
    """What to call a value of a wrong type in a message: ``None``, ``a dict``."""
    return "None" if value is None else f"a {type(value).__name__}"


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that is not among those known, with the nearest of them."""
    known = list(known)
    near = difflib.get_close_matches(name.lower().replace("-", ""), known, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"unknown {what} {name!r}{hint}; expected one of: {', '.join(known)}"
