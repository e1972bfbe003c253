"""Whether a saved profile is what a run would make, so that it need not be measured again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from guided_dropout.fisher.estimate import check_devices
from guided_dropout.fisher.profile import FisherProfile
from guided_dropout.fisher.selection import Choice, select_parameters
from guided_dropout.fisher.site_scores import StoppingRule
from guided_dropout.identity import model_identity, weights_identity
from guided_dropout.provenance import provenance
from guided_dropout.unfinished import check_finished

# Of what a rule to stop by reports: what it was asked for.
_RULE = ("rule", "confidence", "tolerance", "tau")
# Of a profile's provenance: what a run finds, wherever it is made, and is not given.
_FOUND = {"device", "kernel", "ranking", "left_out", "sample_digests"}


def finished_profile(
    folder: str | Path,
    model: nn.Module,
    *,
    parameters: Choice,
    objective: str,
    scores_only: bool,
    save_dtype: str,
    until_ranked: StoppingRule | None,
    **settings: Any,
) -> FisherProfile:
    """The profile in `folder`, once it is known to be of this run.

    What it does not record cannot be compared: the text itself, of which it holds the name, and which parameters were
    chosen, of which it holds how many there are.

    Args:
        folder: with a profile in it.
        model: loaded for this run.
        parameters: see `estimate_fisher`, as are the others that have a name there.
        objective: likewise; ``"auto"`` is whatever the model computes, and is not compared.
        scores_only: likewise.
        save_dtype: of the values on disk.
        until_ranked: likewise.
        settings: the others by the names that they have in the profile, or in its provenance.

    Raises:
        ArtefactError: it is of another run, and what differs is told from both sides; or it is damaged.
        ModelError: parts of the model are offloaded.
    """
    found = FisherProfile.from_pretrained(Path(folder))
    check_devices(model)
    chosen = select_parameters(model, parameters)
    identity = {**model_identity(model), **weights_identity(model, [*chosen])}
    run = {
        "model": {key: value for key, value in identity.items() if key in found.model},  # earlier ones have no digest
        "parameters": len(chosen),
        "objective": found.objective if objective == "auto" else objective,
        "dtype": _dtypes(chosen),
        "save_dtype": None if scores_only else save_dtype,
        "until": _rule(until_ranked.report() if until_ranked else {}),
        **{key: value for key, value in settings.items() if key != "taken" or key in found.provenance},  # as above
    }
    made_with = found.provenance.keys() - provenance().keys() - _FOUND
    there = {
        "model": {key: value for key, value in found.model.items() if key != "revision"},  # the digest tells
        "parameters": len(found.shapes),
        "objective": found.objective,
        "reduction": found.reduction,
        "labels": found.labels,
        "save_dtype": _dtypes(found.diagonal) or None,
        "until": _rule(found.provenance.get("ranking", {})),
        **{key: found.provenance[key] for key in sorted(made_with)},
    }
    check_finished(f"{folder} holds the profile", there, run)
    return found


def _dtypes(tensors: Mapping[str, Any]) -> str:
    return ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}))


def _rule(report: Mapping[str, Any]) -> dict[str, Any]:
    return {key: report[key] for key in _RULE if key in report}
