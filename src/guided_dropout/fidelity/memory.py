"""How much memory a run needs, known before it starts."""

from __future__ import annotations

from pathlib import Path

import psutil

from guided_dropout.errors import DataError

_CGROUP = Path("/sys/fs/cgroup")


def bytes_needed(parameters: int, element: int, draws: int, fractions: int, top: float) -> int:
    """Of the CPU's memory, beside the model's own.

    Args:
        parameters: how many are measured.
        element: bytes of one number in the sums: 4, or 8 for a float64 model.
        draws: D.
        fractions: K.
        top: the largest share of the parameters that is compared.

    Returns:
        The D·K + 1 sums and that of the cell at hand; the profile's float32 values; for the comparison, a dozen float64
        arrays as long as the top set.
    """
    sums = (draws * fractions + 2) * element
    return parameters * (sums + 4) + int(12 * 8 * top * parameters)


def bytes_available() -> int:
    """What the machine has to give, or the container that this runs in."""
    free = psutil.virtual_memory().available
    try:
        most, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no container, or none with a limit
        return free
    return min(free, most - used)


def check_memory(needed: int, limit: int | None) -> None:
    """Refuse what does not fit.

    Raises:
        DataError: more is needed than `limit`, or where that is None than there is.
    """
    there = bytes_available() if limit is None else limit
    if needed > there:
        raise DataError(
            f"the sums of all sub-samples need {in_gigabytes(needed)}; expected no more than the {in_gigabytes(there)} "
            f"{'available' if limit is None else 'allowed'}: lower the number of draws or of fractions, or compare the "
            "schedules alone (scores only), which needs next to none"
        )


def in_gigabytes(size: int) -> str:
    """``2.4 GB``, of a thousand million bytes; small sizes in MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
