"""What a result was made with: versions, code, machine, date."""

from __future__ import annotations

import functools
import hashlib
import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("guided-dropout", "torch", "transformers", "accelerate", "datasets", "numpy", "scipy", "scikit-learn")


def provenance(**facts: Any) -> dict[str, Any]:
    """Versions of the packages that shape a number, this one's code, the machine's kind, the date (UTC), and more.

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
        "code": code_digest(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **facts,
    }


@functools.cache
def code_digest() -> str:
    """Twelve digits that tell this package's code, C sources included, from that of any other moment of a version."""
    folder, digest = Path(__file__).parent, hashlib.sha256()
    for file in sorted(f for f in folder.rglob("*") if f.suffix in (".py", ".c", ".h")):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(folder).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]
