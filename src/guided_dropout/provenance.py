"""What a result was made with: versions, machine, date."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import torch

_PACKAGES = ("guided-dropout", "torch", "transformers", "accelerate", "datasets", "numpy", "scipy", "scikit-learn")


def provenance(**facts: Any) -> dict[str, Any]:
    """Versions of the packages that shape a number, the machine's kind, the date (UTC), and whatever is given.

    Args:
        facts: further facts that can be written as JSON, for instance ``device="cpu"``, ``seed=0``.
    """
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **facts,
    }
