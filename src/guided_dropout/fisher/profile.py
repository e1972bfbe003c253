"""The measured Fisher information of a model, as a thing that can be saved, loaded and read."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from guided_dropout.artefacts import (
    check_in_place,
    check_output_folder,
    read_json,
    read_tensors,
    sha256_of,
    staged_folder,
    write_json,
    write_tensors,
    write_text,
)
from guided_dropout.errors import ArtefactError, DataError, describe, unknown
from guided_dropout.fisher import hub
from guided_dropout.fisher.card import card
from guided_dropout.fisher.facts import check_facts
from guided_dropout.fisher.topk import Selection, select
from guided_dropout.identity import backbone_weights, model_identity, relative_name, same_weights

KIND = "fisher-profile"
SCHEMA = 2
JSON_NAME = "profile.json"
TENSORS_NAME = "fisher.safetensors"
CARD_NAME = "README.md"
_FILES = (JSON_NAME, TENSORS_NAME, CARD_NAME)

# How far a mean may be from that of its values: these may have been bfloat16 several times, whatever they are now (a
# profile that was loaded, merged and saved again), and what is too small for float32 is 0 among them.
_ROUNDED, _TINY = 0.02, 1e-37

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""On disk. bfloat16 has float32's range and 8 significant bits: each value is off by at most 0.4 %."""


@dataclass(frozen=True)
class FisherProfile:
    r"""Diagonal of the empirical Fisher information, :math:`F_j = \frac1N\sum_i(\partial\ell_i/\partial\theta_j)^2`.

    Eq. 3 of Sharma et al. (2024); :math:`\ell_i` is one sample's loss in nats, squares are taken per sample.

    Attributes:
        diagonal: for each name of ``model.named_parameters()``, :math:`F` as a float32 tensor of the parameter's shape
            (bfloat16 where it was saved so). Tied parameters stand once, under the name that ``named_parameters``
            gives, with the gradients of all their uses summed before squaring. Empty where only the means were kept.
        tensor_means: for each name, the mean of its :math:`F` over its elements, in float64 whatever `diagonal` is.
        num_samples: N, the samples that had at least one target.
        num_skipped: samples without a target, which do not count.
        objective: ``"mlm"``, ``"causal"``, ``"seq2seq"``, ``"classification"`` or ``"regression"``.
        reduction: ``"mean"`` or ``"sum"`` over a sample's targets.
        model: what `identity.model_record` says of the model, and `identity.weights_identity` of its weights, of
            which earlier files have less or nothing.
        coverage: ``{"fallback": [names], "parameters_by_rule": share}``: which parameters needed the slow loop.
        provenance: versions, machine, date, seed, text; ``"kernel"``, what squared the gradients: ``"amx"``,
            ``"native"`` (C without AMX), ``"triton"`` or ``"torch"``, several with commas between them.
        labels: ``"data"`` for the empirical Fisher, ``"model"`` where they were drawn from the model's prediction.
        shapes: name → the parameter's shape; taken from `diagonal` where that holds values, needed where it does not.
        noise: names whose true gradient is zero, so that their values are rounding noise (attention's key biases under
            softmax): they take no part in rankings and scores.

    Raises:
        ArtefactError: means without shapes, or values without means, noise that is none of the tensors, or no samples.
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
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    noise: Sequence[str] = ()

    def __post_init__(self) -> None:
        given = {name: t.shape for name, t in self.diagonal.items()} or self.shapes
        shapes = {name: tuple(shape) for name, shape in given.items()}
        object.__setattr__(self, "shapes", shapes)
        object.__setattr__(self, "noise", tuple(self.noise))
        if odd := sorted({*shapes} ^ {*self.tensor_means}):
            raise ArtefactError(
                f"a profile whose shapes and tensor means differ in {odd[0]}; expected values or a shape for "
                "each mean: give both"
            )
        if self.num_samples < 1:
            raise ArtefactError(f"a profile of {self.num_samples} samples; expected at least 1")
        if odd := [name for name in self.noise if name not in self.tensor_means]:
            raise ArtefactError(f"the profile names {odd[0]} as noise but holds no such tensor; expected one it holds")

    def topk(self, fraction: float, *, largest: bool = True) -> Selection:
        """The parameters with the largest (or smallest) values, those of `noise` left out of the count.

        Args:
            fraction: share of the parameters, in [0, 1]; see `topk.select` for rounding and ties.
            largest: the largest; otherwise the smallest.

        Returns:
            The selection; its masks cover all tensors, those of `noise` with no element chosen.

        Raises:
            DataError: a fraction outside [0, 1].
            ArtefactError: the profile holds tensor means only, or a value that is no Fisher value.
        """
        return select(self.values("the largest parameters"), fraction, largest=largest, exclude=self.noise)

    def values(self, what: str) -> Mapping[str, torch.Tensor]:
        """`diagonal`, for a use that needs it.

        Args:
            what: the use, in the plural, for the message.

        Raises:
            ArtefactError: the profile holds tensor means only.
        """
        if not self.diagonal:
            raise ArtefactError(
                f"the profile of {self.title} holds tensor means only, no value per parameter; {what} need them: "
                "estimate it again without --scores-only"
            )
        return self.diagonal

    @property
    def title(self) -> str:
        """What to call the model."""
        return self.model.get("name_or_path") or self.model.get("architecture") or "a model without a name"

    def has_weights_of(self, model: nn.Module) -> bool | None:
        """Whether `model` has the weights that this was measured on; None where that cannot be told.

        Under another head the backbones are compared. It cannot be told where the profile does not say, the model
        lacks some of the backbone that was measured, or either is in float16.
        """
        made_on, here = self.model.get("digest"), model_identity(model)
        if made_on is not None and all(here[key] == self.model.get(key) for key in ("architecture", "num_parameters")):
            return same_weights(made_on, dict(model.named_parameters()))
        backbone, prefix = self.model.get("backbone"), self.model.get("backbone_prefix", "")
        if backbone is None:
            return None
        names = {relative_name(name, prefix) for name in self.shapes if name.startswith(prefix)}
        found = backbone_weights(model, names)
        return same_weights(backbone["digest"], found) if len(found) == backbone["tensors"] > 0 else None

    def weights_note(self, model: nn.Module) -> str | None:
        """What to tell a person whose `model` has other weights than this was measured on; None where there is nothing.

        Other weights are no error: fine-tuning changes them.
        """
        if self.has_weights_of(model) is not False:
            return None
        here = model_identity(model)
        return (
            f"note: the profile was measured on other weights ({self.title}) than those of "
            f"{here['name_or_path'] or here['architecture']}"
        )

    def save_pretrained(self, folder: str | Path, *, dtype: str | torch.dtype | None = None) -> Path:
        """Write `folder` (``fisher.safetensors``, ``profile.json``, ``README.md``), all or nothing; return its path.

        Without values per parameter there is no ``fisher.safetensors``.

        Args:
            folder: where to; a profile that it holds is replaced, other files stay.
            dtype: a key or a value of `DTYPES` for the values per parameter; as they are if None. The tensor means are
                not affected.

        Raises:
            ArtefactError: the folder cannot be written, or holds other things than a profile.
            DataError: an unknown dtype.
        """
        folder = check_output_folder(folder, marker=JSON_NAME)
        stored = self if dtype is None else self._as(check_dtype(dtype))
        with staged_folder(folder, own=(TENSORS_NAME, JSON_NAME, CARD_NAME)) as tmp:
            values = None
            if stored.diagonal:
                file = tmp / TENSORS_NAME
                write_tensors(file, stored.diagonal, metadata={"format": "pt", "kind": KIND})
                kinds = sorted({str(t.dtype).removeprefix("torch.") for t in stored.diagonal.values()})
                values = {"file": TENSORS_NAME, "dtype": ", ".join(kinds), "sha256": sha256_of(file)}
            write_json(tmp / JSON_NAME, stored._facts(values))
            write_text(tmp / CARD_NAME, stored.card())
        return folder

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        verify: bool = True,
    ) -> FisherProfile:
        """Read what `save_pretrained` or `push_to_hub` wrote.

        Args:
            source: a folder; a string that is no folder but reads ``"user/name"`` is sought on the hub.
            revision: branch, tag or commit on the hub.
            token: for a private repository on the hub; by default the one that ``hf auth login`` stored.
            verify: compare the file of values with its digest, which reads it once more, and the means with the values.

        Raises:
            ArtefactError: there is no such profile, something is missing or damaged, or the values are not those that
                the JSON describes.
        """
        folder = Path(source)
        if folder.is_file():
            raise ArtefactError(
                f"{folder} is a file; expected the folder of a profile, which `guided-dropout fisher … --out` wrote: "
                "give the folder"
            )
        check_in_place(folder)
        if not folder.is_dir() and isinstance(source, str) and hub.is_repo_id(source):
            folder = hub.download(source, files=_FILES, revision=revision, token=token)
        if not folder.is_dir():
            raise ArtefactError(
                f"no folder {folder}; expected one that `guided-dropout fisher … --out {folder}` wrote: run that first"
            )
        return cls._read(folder, verify)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload Fisher profile",
        dtype: str | torch.dtype | None = None,
    ) -> str:
        """Upload the profile to a model repository of the hub, which is made if there is none.

        Args:
            repo_id: ``"user/name"``.
            private: make a new repository private; by default what the account's default is.
            token: by default the one that ``hf auth login`` stored.
            revision: branch; by default the main one.
            commit_message: of the upload.
            dtype: as for `save_pretrained`.

        Returns:
            The commit's address.

        Raises:
            ArtefactError: the hub cannot be reached or refuses.
            DataError: an unknown dtype.
        """
        with tempfile.TemporaryDirectory() as tmp:
            folder = self.save_pretrained(Path(tmp) / "profile", dtype=dtype)
            return hub.upload(
                folder, repo_id, files=_FILES,
                private=private, token=token, revision=revision, commit_message=commit_message,
            )  # fmt: skip

    def card(self) -> str:
        """A README for people and the hub: what was measured, on what, and which tensors carry most."""
        return card(self)

    @classmethod
    def _read(cls, folder: Path, verify: bool) -> FisherProfile:
        facts = read_json(folder / JSON_NAME, kind=KIND, schema=SCHEMA)
        names = [*cls.__dataclass_fields__.keys() - {"diagonal"}, "values"]
        check_facts(folder / JSON_NAME, facts, names)
        values = facts["values"]
        diagonal = {} if values is None else _read_values(folder / TENSORS_NAME, facts["shapes"], values, verify)
        if verify:
            _check_means(folder, facts["tensor_means"], diagonal)
        return cls(diagonal=diagonal, **{name: facts[name] for name in names if name != "values"})

    def _as(self, dtype: torch.dtype) -> FisherProfile:
        return replace(self, diagonal={name: t.to(dtype) for name, t in self.diagonal.items()})

    def _facts(self, values: Mapping[str, str] | None) -> dict[str, Any]:
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
            "noise": list(self.noise),
            "provenance": dict(self.provenance),
            "values": values,
            "tensor_means": dict(self.tensor_means),
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
        }


def check_profile(given: object, who: str) -> FisherProfile:
    """`given`, which must be a profile.

    Raises:
        ArtefactError: it is none.
    """
    if isinstance(given, FisherProfile):
        return given
    todo = "measure one with estimate_fisher"
    if isinstance(given, str | Path):
        todo = f"give FisherProfile.from_pretrained({str(given)!r})"
    elif isinstance(given, list | tuple):
        todo = f"give them one by one, {who}(*profiles)"
    raise ArtefactError(f"{who} was given {describe(given)} for a profile; expected a FisherProfile: {todo}")


def check_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The dtype to store values in.

    Raises:
        DataError: none of `DTYPES`.
    """
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    if not isinstance(name, str):
        raise DataError(f"{describe(name)} for a dtype; expected its name, one of: {', '.join(DTYPES)}")
    if name == "float16":
        raise DataError(
            "dtype float16 cannot hold Fisher values: it has nothing below 6e-8, where most of them are; expected "
            "float32, or bfloat16 for half the size"
        )
    if name not in DTYPES:
        raise DataError(unknown("dtype", name, DTYPES))
    return DTYPES[name]


def _read_values(
    file: Path, shapes: Mapping[str, list[int]], facts: Mapping[str, str], verify: bool
) -> dict[str, torch.Tensor]:
    """The tensors, in the order of `shapes`, once they are known to be those that the JSON describes."""
    diagonal = read_tensors(file)
    found = {name: list(t.shape) for name, t in diagonal.items()}
    if found != shapes:
        odd = sorted(n for n in {*found, *shapes} if found.get(n) != shapes.get(n))
        raise ArtefactError(
            f"{file} does not belong to {JSON_NAME}: {odd[0]} is {found.get(odd[0], 'missing')}, "
            f"expected {shapes.get(odd[0], 'nothing')}; estimate the profile again"
        )
    if verify and (digest := sha256_of(file)) != facts["sha256"]:
        raise ArtefactError(
            f"{file} is damaged or another profile's: its sha256 is {digest[:12]}…, expected {facts['sha256'][:12]}… "
            f"by {JSON_NAME}: copy or download both files again, or estimate the profile again"
        )
    return {name: diagonal[name] for name in shapes}


def _check_means(folder: Path, means: Mapping[str, float], diagonal: Mapping[str, torch.Tensor]) -> None:
    """Make sure that the JSON's means are those of the values."""
    for name, values in diagonal.items():
        mean = values.sum(dtype=torch.float64).item() / max(1, values.numel())
        if not math.isclose(mean, means[name], rel_tol=_ROUNDED, abs_tol=_TINY):
            raise ArtefactError(
                f"{folder / JSON_NAME} has {means[name]:.6g} for the mean of {name}; expected {mean:.6g}, that of its "
                f"values in {TENSORS_NAME}: copy or download both files again, or estimate the profile again"
            )
