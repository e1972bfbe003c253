r"""Directions in parameter space: Gaussian and normalised, or toward other weights.

Eq. 5 of Sharma et al. (2024) moves the weights to :math:`\theta^* + \alpha\delta + \beta\eta`, with Gaussian directions
that are normalised per filter (Li et al., 2018, section 4): each slice of a parameter's first dimension gets the norm
of the same slice of :math:`\theta^*`, so that scaling a slice scales its step alike, and a step of 1 is as long as the
weights are. The first dimension is a linear layer's outputs; in GPT-2, whose matrices are stored the other way round,
its inputs.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from guided_dropout.artefacts import read_header, read_tensors, write_tensors
from guided_dropout.errors import DataError, ModelError, unknown
from guided_dropout.identity import backbone_name, in_head, model_identity

KIND = "landscape-direction"
SCHEMA = 1
NORMALISATIONS = ("filter", "tensor", "none")
VECTORS = ("held", "moved")
# Beside 0 (blocks of text), 1 (what is masked) and 2 (labels): other random numbers for the same seed.
_STREAM = 3


@dataclass(frozen=True)
class Direction:
    """A direction in a model's parameter space.

    Attributes:
        tensors: name in ``model.named_parameters()`` → the step of that parameter at a length of 1, of its shape, in
            float32 (float64 for float64 weights), on the CPU. Parameters that are not named do not move; those that
            share one tensor are moved once, under the first of their names.
        facts: what it was made from, as JSON.
    """

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def norm(self) -> float:
        """Euclidean length, summed in float64."""
        squares = (torch.linalg.vector_norm(t, dtype=torch.float64).item() ** 2 for t in self.tensors.values())
        return math.sqrt(math.fsum(squares))

    @property
    def num_moved(self) -> int:
        """How many parameters it changes."""
        return sum(int(torch.count_nonzero(t)) for t in self.tensors.values())

    def scaled(self, factor: float) -> Direction:
        """The same direction, `factor` times as long."""
        return Direction({name: t * factor for name, t in self.tensors.items()}, {**self.facts, "scaled": factor})

    def masked(self, masks: Mapping[str, Tensor]) -> Direction:
        """The part of it in which `masks` (name → bool, of the parameter's shape) is true; 0 elsewhere."""
        kept = {name: t * masks[name] for name, t in self.tensors.items() if name in masks}
        return Direction(kept, self.facts)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, all or nothing; return its path.

        Raises:
            ArtefactError: it cannot be written.
        """
        facts = json.dumps(dict(self.facts))
        write_tensors(path, self.tensors, {"format": "pt", "kind": KIND, "schema": str(SCHEMA), "facts": facts})
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Direction:
        """Read what `save` wrote.

        Raises:
            ArtefactError: no such file, damaged, or no direction.
        """
        advice = "give a file that Direction.save wrote"
        facts = read_header(path, kind=KIND, schema=SCHEMA, key="facts", advice=advice)
        return cls(read_tensors(path), facts)


def gaussian_direction(
    model: nn.Module, *, seed: int = 0, axis: int = 0, normalise: str = "filter", vectors: str = "held"
) -> Direction:
    """A Gaussian direction from the model's weights.

    What is drawn for a parameter is a function of (seed, axis, its name relative to the backbone) and of its shape
    alone: a masked LM and the classifier made from it get the same direction.

    Args:
        model: on any device; floating-point parameters of any precision.
        seed: 0 or more.
        axis: which of the directions of that seed, from 0.
        normalise: ``"filter"``: each slice of the first dimension gets the norm of the same slice of the weights;
            ``"tensor"``: each parameter as a whole; ``"none"``: standard normal, as drawn. A slice of zeros does not
            move under the former two.
        vectors: parameters with fewer than two dimensions (biases, the scales of normalisations) are ``"held"``, as in
            Li et al. (2018), or ``"moved"``. A slice of a vector is one number, whose norm would leave nothing random
            but a sign, so that a moved vector is normalised as a whole under ``"filter"`` too.

    Raises:
        DataError: an unknown option or a negative seed.
        ModelError: a parameter is offloaded, or there is none to move.
    """
    if normalise not in NORMALISATIONS:
        raise DataError(unknown("normalisation", normalise, NORMALISATIONS))
    if vectors not in VECTORS:
        raise DataError(unknown("treatment of vectors", vectors, VECTORS))
    if seed < 0:
        raise DataError(f"seed {seed}; expected 0 or more")
    tensors = {}
    for name, p in movable_parameters(model).items():
        if vectors == "moved" or p.dim() > 1:
            drawn = _draw(backbone_name(model, name), p.shape, seed, axis)
            weights = p.detach().to("cpu", step_dtype(p))
            tensors[name] = _normalised(drawn.to(weights.dtype), weights, normalise)
    facts = {"kind": "gaussian", "seed": seed, "axis": axis, "normalise": normalise, "vectors": vectors}
    return _checked(tensors, facts, model)


def toward(model: nn.Module, other: nn.Module) -> Direction:
    r"""From the model's weights to another's: at a length of 1 stands `other`, up to rounding.

    Args:
        model: where the direction starts, for instance the pretrained model.
        other: with the same backbone, for instance fine-tuned; heads may differ, and are left out where they do.

    Raises:
        ModelError: a parameter of the backbone is missing in `other` or of another shape, or nothing differs.
    """
    there = {backbone_name(other, name): p for name, p in movable_parameters(other).items()}
    tensors, left_out = {}, []
    for name, p in movable_parameters(model).items():
        end = there.get(backbone_name(model, name))
        if end is None or end.shape != p.shape:
            if not in_head(model, name):
                found = "missing" if end is None else f"of shape {list(end.shape)}"
                raise ModelError(
                    f"{name} is {found} in {type(other).__name__}; expected {list(p.shape)} as in "
                    f"{type(model).__name__}: give a model that was fine-tuned from this one"
                )
            left_out.append(name)
            continue
        wide = torch.promote_types(step_dtype(p), step_dtype(end))
        step = end.detach().to("cpu", wide) - p.detach().to("cpu", wide)
        if step.any():
            tensors[name] = step.to(step_dtype(p))
    facts = {"kind": "toward", "model": model_identity(other), "left_out": left_out}
    return _checked(tensors, facts, model)


def movable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Floating-point parameters by their name in ``model.named_parameters()``; what shares memory stands once.

    Raises:
        ModelError: one is offloaded, and cannot be written.
    """
    found: dict[str, nn.Parameter] = {}
    seen = set()
    for name, p in model.named_parameters():
        if p.is_meta:
            raise ModelError(
                f"{name} of {type(model).__name__} is offloaded; expected all parameters on devices that compute: use "
                "a larger device or a smaller --dtype"
            )
        place = (p.data_ptr(), p.shape, p.stride())
        if p.is_floating_point() and p.numel() and place not in seen:
            found[name] = p
            seen.add(place)
    return found


def step_dtype(parameter: Tensor) -> torch.dtype:
    """In which steps from this parameter are computed: float32, or wider weights' own."""
    return torch.promote_types(parameter.dtype, torch.float32)


def _draw(name: str, shape: torch.Size, seed: int, axis: int) -> Tensor:
    digest = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
    rng = np.random.default_rng([seed, _STREAM, axis, digest])
    return torch.from_numpy(np.asarray(rng.standard_normal(tuple(shape), dtype=np.float32)))


def _normalised(drawn: Tensor, weights: Tensor, how: str) -> Tensor:
    if how == "none":
        return drawn
    rows = len(drawn) if how == "filter" and drawn.dim() > 1 else 1
    norms = [torch.linalg.vector_norm(t.reshape(rows, -1), dim=1, dtype=torch.float64) for t in (drawn, weights)]
    factors = (norms[1] / norms[0].clamp(min=torch.finfo(torch.float64).tiny)).to(drawn.dtype)
    return (drawn.reshape(rows, -1) * factors[:, None]).reshape(drawn.shape)


def _checked(tensors: dict[str, Tensor], facts: dict[str, Any], model: nn.Module) -> Direction:
    if not any(t.any() for t in tensors.values()):
        raise ModelError(
            f"the direction ({facts['kind']}) moves no parameter of {type(model).__name__}; expected at least one: "
            "give another model, or move the vectors too"
        )
    return Direction(tensors, facts)
