"""The README of a saved profile, with the metadata by which the hub finds it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCardData

from guided_dropout.fisher import hub
from guided_dropout.fisher.coverage import told

if TYPE_CHECKING:
    from guided_dropout.fisher.profile import FisherProfile


def card(profile: FisherProfile) -> str:
    """A README for people: what was measured, on what, and which tensors carry most; the hub's YAML on top."""
    return "\n\n".join([
        f"---\n{_metadata(profile).to_yaml()}\n---",
        f"# Fisher profile of {profile.title}",
        _measured(profile),
        _stored(profile),
        _heaviest(profile),
    ]) + "\n"  # fmt: skip


def _metadata(profile: FisherProfile) -> ModelCardData:
    name = profile.model.get("name_or_path")
    on_hub = name and hub.is_repo_id(name) and not Path(name).exists()
    tags = ["fisher-information", "guided-dropout", profile.objective]
    return ModelCardData(library_name="guided-dropout", tags=tags, base_model=name if on_hub else None)


def _measured(profile: FisherProfile) -> str:
    fallback = "" if profile.coverage.get("fallback") else " No parameter needed the per-sample loop."
    coverage = "".join(f" {sentence[0].upper()}{sentence[1:]}." for sentence in told(profile.coverage, quote="`"))
    parts = profile.provenance.get("merged", [])
    kind = {"data": "empirical", "model": "sampled"}[profile.labels]
    merged = f" Merged from {len(parts)} measurements." if parts else ""
    term = profile.provenance.get("left_out")
    left_out = f" Left out of the loss: {term}." if term else ""
    return (
        f"Diagonal of the {kind} Fisher information of `{profile.model.get('architecture')}` "
        f"({profile.model.get('num_parameters', 0):,} parameters): the mean over {profile.num_samples:,} samples of "
        f"each squared derivative of a sample's loss ({profile.objective}, {profile.reduction} over its targets). "
        f"{profile.num_skipped:,} samples without a target were skipped.{merged}{left_out}{fallback}{coverage}"
    )


def _stored(profile: FisherProfile) -> str:
    lines = ["Made by guided-dropout; read it with `FisherProfile.from_pretrained`."]
    parts = [profile.provenance, *profile.provenance.get("merged", [])]
    if kernels := sorted({name for part in parts for name in part.get("kernel", "").split(", ") if name}):
        lines.append(f"Squared by {' and '.join(f'`{name}`' for name in kernels)} (`kernel` in profile.json).")
    if not profile.diagonal:
        lines.append(
            "It holds the mean of each tensor, which is all that a dropout schedule needs, and no value per parameter."
        )
    if any(str(t.dtype) == "torch.bfloat16" for t in profile.diagonal.values()):
        lines.append(
            "The values per parameter are stored in bfloat16: each is off by at most 0.4 %. The means of the tensors "
            "are of the unrounded values."
        )
    if profile.noise:
        lines.append(
            "These tensors have a true gradient of zero and hold rounding noise alone, so they are left out of "
            f"rankings and scores: {', '.join(f'`{n}`' for n in profile.noise)}."
        )
    return " ".join(lines)


def _heaviest(profile: FisherProfile) -> str:
    means = {name: mean for name, mean in profile.tensor_means.items() if name not in profile.noise}
    total = {name: mean * math.prod(profile.shapes[name]) for name, mean in means.items()}
    whole = sum(total.values()) or 1.0
    top = sorted(total, key=lambda n: -total[n])[:10]
    rows = "\n".join(f"| `{n}` | {means[n]:.3e} | {total[n] / whole:.1%} |" for n in top)
    return f"| the ten heaviest tensors | mean F | share of the total |\n|---|---|---|\n{rows}"
