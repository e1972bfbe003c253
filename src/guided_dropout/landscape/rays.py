"""The directions of each mask and seed: given, or found, or drawn; then masked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from guided_dropout.errors import DataError, ModelError
from guided_dropout.fisher.processes import Processes
from guided_dropout.landscape.curvature import hessian_directions
from guided_dropout.landscape.directions import Direction, gaussian_direction, movable_parameters
from guided_dropout.landscape.losses import Evaluation
from guided_dropout.landscape.masks import Mask, Masker
from guided_dropout.landscape.record import DIRECTIONS_NAME


class Rays:
    """The directions of a seed under a mask.

    Args:
        model: where they start.
        masker: turns masks into choices of its parameters.
        given: the first directions, the same for each seed; Gaussian ones are drawn for what lacks.
        dims: how many directions.
        options: of `gaussian_direction`.
    """

    def __init__(self, model: nn.Module, masker: Masker, given: Sequence[Direction], dims: int, **options: Any):
        self._model, self._masker, self._given, self._dims = model, masker, list(given), dims
        self._options = options
        self._held: tuple[int, list[Direction]] | None = None

    def full(self, seed: int) -> list[Direction]:
        """The unmasked directions of a seed."""
        if self._held is None or self._held[0] != seed:
            missing = range(len(self._given), self._dims)
            drawn = [gaussian_direction(self._model, seed=seed, axis=axis, **self._options) for axis in missing]
            self._held = seed, [*self._given, *drawn]
        return self._held[1]

    def masked(self, mask: Mask, seed: int) -> list[Direction]:
        """What a mask leaves of them, as long as before where it says so.

        Raises:
            DataError: nothing of one of them.
            ArtefactError: a mask without a fitting profile.
        """
        full = self.full(seed)
        if mask.kind == "all":
            return full
        masks = self._masker.masks(mask, {name: t for d in full for name, t in d.tensors.items()}, seed=seed)
        parts = [d.masked(masks) for d in full]
        if any(not part.norm for part in parts):
            raise DataError(f"mask {mask.name} leaves nothing of a direction; expected something: use a larger share")
        if mask.equal_norm:
            parts = [part.scaled(d.norm / part.norm) for part, d in zip(parts, full, strict=True)]
        return parts


def check_given(model: nn.Module, directions: Sequence[Direction], dims: int) -> list[Direction]:
    """The caller's directions, once they are known to be the model's.

    Raises:
        DataError: too many or none.
        ModelError: they move what the model does not have.
    """
    if not 1 <= len(directions) <= dims:
        raise DataError(f"{len(directions)} directions for {dims} dimensions; expected one for each, or fewer")
    own = {name: p.shape for name, p in movable_parameters(model).items()}
    for direction in directions:
        for name, t in direction.tensors.items():
            if own.get(name) != t.shape:
                raise ModelError(
                    f"a direction moves {name} of shape {list(t.shape)}; expected a parameter of "
                    f"{type(model).__name__} of that shape: give a direction of this model"
                )
    return list(directions)


def sharpest(
    evaluation: Evaluation,
    dims: int,
    vectors: str,
    *,
    folder: str | Path | None,
    of: Mapping[str, Any],
    resume: bool,
    world: Processes,
) -> list[Direction]:
    """`hessian_directions`, kept in `folder`: finding them takes long, and a resumed run must go on along the same.

    Args:
        evaluation: of the model and text.
        dims: how many.
        vectors: ``"held"`` or ``"moved"``.
        folder: where the points of the run are kept; nowhere if None.
        of: what they depend on; those of something else are not taken.
        resume: whether to take what lies in `folder`.
        world: its main process writes.
    """
    files = [] if folder is None else [Path(folder) / DIRECTIONS_NAME.format(axis) for axis in range(dims)]
    if resume and files and all(file.exists() for file in files):
        held = [Direction.load(file) for file in files]
        if all(direction.facts.get("of") == of for direction in held):
            return held
    found, _ = hessian_directions(evaluation, count=dims, vectors=vectors)
    found = [Direction(d.tensors, {**d.facts, "of": dict(of)}) for d in found]
    if world.is_main:
        for file, direction in zip(files, found, strict=False):
            direction.save(file)
    return found
