"""The measured Fisher information of a model, as a thing that can be saved, loaded and read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from guided_dropout.artefacts import (
    check_output_folder,
    read_json,
    read_tensors,
    staged_folder,
    write_json,
    write_tensors,
    write_text,
)
from guided_dropout.errors import ArtefactError

KIND = "fisher-profile"
SCHEMA = 1
JSON_NAME = "profile.json"
TENSORS_NAME = "fisher.safetensors"


@dataclass(frozen=True)
class FisherProfile:
    r"""Diagonal of the empirical Fisher information, :math:`F_j = \frac1N\sum_i(\partial\ell_i/\partial\theta_j)^2`.

    Eq. 3 of Sharma et al. (2024); :math:`\ell_i` is one sample's loss in nats, squares are taken per sample.

    Attributes:
        diagonal: for each name of ``model.named_parameters()``, :math:`F` as a float32 tensor of the parameter's shape.
            Tied parameters stand once, under the name that ``named_parameters`` gives, with the gradients of all their
            uses summed before squaring.
        tensor_means: for each name, the mean of its :math:`F` over its elements, summed in float64.
        num_samples: N, the samples that had at least one target.
        num_skipped: samples without a target, which do not count.
        objective: ``"mlm"``, ``"causal"``, ``"seq2seq"``, ``"classification"`` or ``"regression"``.
        reduction: ``"mean"`` or ``"sum"`` over a sample's targets.
        model: what `identity.model_identity` says of the model.
        coverage: ``{"fallback": [names], "parameters_by_rule": share}``: which parameters needed the slow loop.
        provenance: versions, machine, date, seed, text.
        labels: ``"data"`` for the empirical Fisher, ``"model"`` where they were drawn from the model's prediction.
    """

    diagonal: Mapping[str, torch.Tensor]
    tensor_means: Mapping[str, float]
    num_samples: int
    num_skipped: int
    objective: str
    reduction: str
    model: Mapping[str, Any]
    coverage: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    labels: str = "data"

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `folder` (``fisher.safetensors``, ``profile.json``, ``README.md``), all or nothing; return its path.

        Raises:
            ArtefactError: the folder cannot be written, or holds other things than a profile.
        """
        folder = check_output_folder(folder, marker=JSON_NAME)
        with staged_folder(folder) as tmp:
            write_tensors(tmp / TENSORS_NAME, self.diagonal, metadata={"format": "pt", "kind": KIND})
            write_json(tmp / JSON_NAME, self._facts())
            write_text(tmp / "README.md", self.card())
        return folder

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> FisherProfile:
        """Read what `save_pretrained` wrote.

        Raises:
            ArtefactError: something is missing or damaged, or the tensors are not those that the JSON names.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ArtefactError(
                f"no folder {folder}; expected one that `guided-dropout fisher … --out {folder}` wrote: run that first"
            )
        facts = read_json(folder / JSON_NAME, kind=KIND, schema=SCHEMA)
        diagonal = read_tensors(folder / TENSORS_NAME)
        shapes = facts.pop("shapes")
        found = {name: list(t.shape) for name, t in diagonal.items()}
        if found != shapes:
            odd = sorted(n for n in {*found, *shapes} if found.get(n) != shapes.get(n))
            raise ArtefactError(
                f"{folder / TENSORS_NAME} does not belong to {JSON_NAME}: {odd[0]} is {found.get(odd[0], 'missing')}, "
                f"expected {shapes.get(odd[0], 'nothing')}; estimate the profile again"
            )
        del facts["kind"], facts["schema"]
        ordered = {name: diagonal[name] for name in shapes}
        return cls(diagonal=ordered, **facts)

    def _facts(self) -> dict[str, Any]:
        return {
            "kind": KIND,
            "schema": SCHEMA,
            "objective": self.objective,
            "reduction": self.reduction,
            "labels": self.labels,
            "num_samples": self.num_samples,
            "num_skipped": self.num_skipped,
            "model": dict(self.model),
            "coverage": dict(self.coverage),
            "provenance": dict(self.provenance),
            "tensor_means": dict(self.tensor_means),
            "shapes": {name: list(t.shape) for name, t in self.diagonal.items()},
        }

    def card(self) -> str:
        """A README for people: what was measured, on what, and which tensors carry most."""
        total = {name: self.tensor_means[name] * t.numel() for name, t in self.diagonal.items()}
        whole = sum(total.values()) or 1.0
        top = sorted(total, key=lambda n: -total[n])[:10]
        rows = "\n".join(f"| `{n}` | {self.tensor_means[n]:.3e} | {total[n] / whole:.1%} |" for n in top)
        name = self.model.get("name_or_path") or self.model.get("architecture")
        fallback = self.coverage.get("fallback", [])
        kind = {"data": "empirical", "model": "sampled"}[self.labels]
        return (
            f"# Fisher profile of {name}\n\n"
            f"Diagonal of the {kind} Fisher information of `{self.model.get('architecture')}` "
            f"({self.model.get('num_parameters', 0):,} parameters): the mean over {self.num_samples:,} samples of each "
            f"squared derivative of a sample's loss ({self.objective}, {self.reduction} over its targets). "
            f"{self.num_skipped:,} samples without a target were skipped. Parameters that needed the per-sample loop: "
            f"{', '.join(f'`{n}`' for n in fallback) or 'none'}.\n\n"
            "Made by guided-dropout; read it with `FisherProfile.from_pretrained`.\n\n"
            f"| the ten heaviest tensors | mean F | share of the total |\n|---|---|---|\n{rows}\n"
        )
