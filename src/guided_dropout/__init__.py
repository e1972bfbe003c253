"""Dropout rates for fine-tuning language models, guided by the Fisher information of the pretrained weights."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from guided_dropout.callbacks import GuidedDropoutCallback
    from guided_dropout.corpus import lm_samples
    from guided_dropout.errors import GuidedDropoutError
    from guided_dropout.fisher import FisherProfile, estimate_fisher
    from guided_dropout.models import load_lm, load_tokenizer
    from guided_dropout.regularizers import DropoutHandle, add_residual_sites, apply_dropout
    from guided_dropout.schedule import DropoutSchedule
    from guided_dropout.sites import DropoutSite, find_sites

__all__ = [
    "DropoutHandle",
    "DropoutSchedule",
    "DropoutSite",
    "FisherProfile",
    "GuidedDropoutCallback",
    "GuidedDropoutError",
    "add_residual_sites",
    "apply_dropout",
    "estimate_fisher",
    "find_sites",
    "lm_samples",
    "load_lm",
    "load_tokenizer",
]

# Where they are; imported when they are asked for, since that takes seconds.
_HOMES = {
    "callbacks": ["GuidedDropoutCallback"],
    "corpus": ["lm_samples"],
    "errors": ["GuidedDropoutError"],
    "fisher": ["FisherProfile", "estimate_fisher"],
    "models": ["load_lm", "load_tokenizer"],
    "regularizers": ["DropoutHandle", "add_residual_sites", "apply_dropout"],
    "schedule": ["DropoutSchedule"],
    "sites": ["DropoutSite", "find_sites"],
}


def __getattr__(name: str) -> Any:
    home = next((home for home, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
