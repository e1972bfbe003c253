"""Losses around a model's weights, as a thing that can be saved, loaded, measured and drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from guided_dropout.artefacts import (
    check_in_place,
    check_output_folder,
    read_json,
    read_tensors,
    sha256_of,
    staged_folder,
    write_json,
    write_tensors,
)
from guided_dropout.errors import ArtefactError, DataError, unknown
from guided_dropout.landscape.curvature import second_difference
from guided_dropout.landscape.directions import Direction
from guided_dropout.landscape.grid import Grid
from guided_dropout.landscape.level import area_below
from guided_dropout.landscape.masks import Mask

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KIND = "loss-landscape"
SCHEMA = 1
JSON_NAME = "landscape.json"
TENSORS_NAME = "landscape.safetensors"
DIRECTIONS_NAME = "direction-{}-{}.safetensors"
_TENSORS = ("losses", "lengths", "moved")
_Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Landscape:
    r"""Losses at :math:`\theta^* + \alpha\delta + \beta\eta` (eq. 5 of Sharma et al., 2024), by mask and seed.

    Attributes:
        losses: [masks, seeds, P] float64, each the mean over the same samples in nats, not finite where the model gave
            nothing finite; in the order of ``grid.coordinates``.
        lengths: [masks, seeds, dims] float64, Euclidean length of the step at a coordinate of 1.
        moved: [masks, seeds] int64, how many parameters change.
        masks: which parameters, see `masks.Mask`.
        seeds: of the directions, the same for each mask.
        grid: which points.
        directions: what they were made from, as JSON.
        objective: the loss, as `fisher.FisherProfile` names it.
        reduction: ``"mean"`` or ``"sum"`` over a sample's targets.
        num_samples: samples with a target.
        model: what `identity.model_record` says of it.
        provenance: versions, machine, date, text.
        kept: (seed, axis) → the unmasked direction, where they were asked to be kept.
    """

    losses: _Array
    lengths: _Array
    moved: npt.NDArray[np.int64]
    masks: Sequence[Mask]
    seeds: Sequence[int]
    grid: Grid
    directions: Mapping[str, Any]
    objective: str
    reduction: str
    num_samples: int
    model: Mapping[str, Any]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    kept: Mapping[tuple[int, int], Direction] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What to call the model."""
        return self.model.get("name_or_path") or self.model.get("architecture") or "a model without a name"

    @property
    def origin_loss(self) -> float:
        """The loss of the weights as they are, in nats."""
        return float(self.losses[0, 0, self.grid.origin])

    def surface(self, mask: str | Mask = "", seed: int | None = None) -> _Array:
        r"""Losses on the grid alone: [points] of a line, or [points, points] of a plane, β down and α across.

        Args:
            mask: its name; the first one if empty.
            seed: of the directions; the first one if None.

        Raises:
            DataError: no such mask or seed.
        """
        grid = self.losses[self._number(mask), self._place(seed), : self.grid.points**self.grid.dims]
        return grid.reshape((self.grid.points,) * self.grid.dims)

    def rises(self, mask: str | Mask = "", radius: float | None = None) -> tuple[_Array, _Array]:
        """How much the loss rises all around: mean and maximum over the circle, or over both sides of a line.

        Args:
            mask: its name; the first one if empty.
            radius: the grid's if None; otherwise half of it, or for a line any of its steps.

        Returns:
            Mean and maximum of the loss less the origin's, each [seeds], in nats.
        """
        numbers = self.grid.on_circle(self.grid.radius if radius is None else radius)
        around = self.losses[self._number(mask)][:, numbers] - self.origin_loss
        return around.mean(1), around.max(1)

    def curvatures(self, mask: str | Mask = "", axis: int = 0) -> tuple[_Array, _Array]:
        r"""The second derivative at the origin along a direction, :math:`\delta^\top H \delta`.

        From differences of losses in steps of ``grid.stencil_step``. Divided by the squared ``lengths`` it is the mean
        curvature per unit of distance, which does not depend on how many parameters move.

        Returns:
            The derivative and an estimate of its error (see `curvature.second_difference`), each [seeds], in nats.
        """
        five = self.losses[self._number(mask)][:, self.grid.stencil(axis)]
        both = [second_difference(row, self.grid.stencil_step) for row in five.tolist()]
        return np.array([d for d, _ in both]), np.array([error for _, error in both])

    def areas(
        self, mask: str | Mask = "", level: float = 1.0, *, smooth: bool = True
    ) -> tuple[_Array, npt.NDArray[np.bool_]]:
        """How much of the grid lies less than `level` nats above the origin's loss; see `level.area_below`.

        Args:
            mask: its name; the first one if empty.
            level: in nats.
            smooth: whether the loss is interpolated smoothly, of a line through all points on it, or linearly.

        Returns:
            Length (line) or area (plane) in units of the coordinates, and whether it reaches the grid's edge, so that
            there is more of it outside; each [seeds].
        """
        number, cut = self._number(mask), []
        for place in range(len(self.seeds)):
            losses = self.losses[number, place]
            if self.grid.dims == 2:
                points, losses = self.grid.steps, self.surface(self.masks[number], self.seeds[place])
            else:
                points, order = np.unique(self.grid.coordinates[:, 0], return_index=True)
                losses = losses[order]
            cut.append(area_below(losses, points, self.origin_loss + level, smooth=smooth))
        return np.array([area for area, _ in cut]), np.array([edge for _, edge in cut])

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw a line as curves, one for each mask, or a plane as contours of the first mask and seed.

        `guided_dropout.plots` has more figures, and their options.

        Args:
            ax: where to draw; a new figure if None.

        Returns:
            The axes.

        Raises:
            DataError: a plane without a finite loss.
        """
        from guided_dropout.plots.landscape import plot_contours, plot_curves

        return plot_curves(self, ax) if self.grid.dims == 1 else plot_contours(self, ax)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `folder` (``landscape.json``, ``landscape.safetensors``, kept directions), all or nothing.

        Raises:
            ArtefactError: the folder cannot be written, or holds other things than a landscape.
        """
        folder = check_output_folder(folder, marker=JSON_NAME)
        with staged_folder(folder, own=(TENSORS_NAME, JSON_NAME, DIRECTIONS_NAME.format("*", "*"))) as tmp:
            file = tmp / TENSORS_NAME
            tensors = {name: torch.from_numpy(np.ascontiguousarray(getattr(self, name))) for name in _TENSORS}
            write_tensors(file, tensors, metadata={"format": "pt", "kind": KIND})
            for (seed, axis), direction in self.kept.items():
                direction.save(tmp / DIRECTIONS_NAME.format(seed, axis))
            write_json(tmp / JSON_NAME, self._facts(sha256_of(file)))
        return folder

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, directions: bool = False) -> Landscape:
        """Read what `save_pretrained` wrote.

        Args:
            folder: where it lies.
            directions: read the kept directions too.

        Raises:
            ArtefactError: something is missing or damaged, or the files do not belong together.
        """
        folder = Path(folder)
        check_in_place(folder)
        if not folder.is_dir():
            raise ArtefactError(
                f"no folder {folder}; expected one that `guided-dropout landscape … --out {folder}` wrote: run that "
                "first"
            )
        facts = read_json(folder / JSON_NAME, kind=KIND, schema=SCHEMA)
        names = {*cls.__dataclass_fields__} - {*_TENSORS, "kept"} | {"sha256", "kept"}
        if missing := sorted(names - {*facts}):
            raise ArtefactError(f"{folder / JSON_NAME} has no {missing[0]!r}; expected a whole {KIND}: make it again")
        tensors = _read_tensors(folder / TENSORS_NAME, facts)
        kept = [(seed, axis) for seed, axis in facts["kept"]] if directions else []
        return cls(
            **tensors,
            masks=tuple(Mask(**mask) for mask in facts["masks"]),
            grid=Grid(**facts["grid"]),
            kept={place: Direction.load(folder / DIRECTIONS_NAME.format(*place)) for place in kept},
            **{
                name: facts[name]
                for name in names - {"masks", "grid", "kept", "sha256"}
            },
        )  # fmt: skip

    def _facts(self, sha256: str) -> dict[str, Any]:
        return {
            "kind": KIND,
            "schema": SCHEMA,
            "masks": [{"kind": m.kind, "share": m.share, "equal_norm": m.equal_norm} for m in self.masks],
            "seeds": list(self.seeds),
            "grid": {"dims": self.grid.dims, "points": self.grid.points, "radius": self.grid.radius},
            "directions": dict(self.directions),
            "objective": self.objective,
            "reduction": self.reduction,
            "num_samples": self.num_samples,
            "model": dict(self.model),
            "provenance": dict(self.provenance),
            "kept": [list(place) for place in self.kept],
            "sha256": sha256,
        }

    def _number(self, mask: str | Mask) -> int:
        name = mask.name if isinstance(mask, Mask) else mask
        names = [m.name for m in self.masks]
        if name and name not in names:
            raise DataError(unknown("mask", name, names))
        return names.index(name) if name else 0

    def _place(self, seed: int | None) -> int:
        if seed is not None and seed not in self.seeds:
            raise DataError(f"seed {seed}; expected one of {', '.join(map(str, self.seeds))}")
        return 0 if seed is None else list(self.seeds).index(seed)


def _read_tensors(file: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays, once they are known to be those that the JSON describes."""
    tensors = {name: t.numpy() for name, t in read_tensors(file).items()}
    if (digest := sha256_of(file)) != facts["sha256"]:
        raise ArtefactError(
            f"{file} is damaged or another landscape's: its sha256 is {digest[:12]}…, expected {facts['sha256'][:12]}… "
            f"by {JSON_NAME}: copy both files again, or make the landscape again"
        )
    return tensors
