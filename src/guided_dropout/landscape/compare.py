"""Numbers beside the pictures, with intervals over the directions' seeds; and masks compared seed by seed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from guided_dropout.bench.stats import ArmSummary, PairedComparison, paired_comparison, summarise, verdict
from guided_dropout.errors import DataError
from guided_dropout.landscape.landscape import Landscape
from guided_dropout.landscape.masks import Mask

_Values = npt.NDArray[np.float64]
_WORDS = {"helps": "more", "hurts": "less"}


@dataclass(frozen=True)
class Measure:
    """One number of a landscape.

    Attributes:
        name: as JSON names it.
        title: for people, with its unit.
        of: landscape and mask → one value per seed.
    """

    name: str
    title: str
    of: Callable[[Landscape, Mask], _Values]


@dataclass(frozen=True)
class Number:
    """A measure of one mask over the seeds.

    Attributes:
        mask: its name.
        measure: its name.
        values: one per seed; None where it is not finite.
        summary: mean, quartiles and t interval; None where a value is not finite.
    """

    mask: str
    measure: str
    values: tuple[float | None, ...]
    summary: ArmSummary | None


@dataclass(frozen=True)
class Difference:
    """A measure of one mask against another of the same share, seed by seed.

    Attributes:
        first: name of the mask in question.
        second: name of the control.
        measure: the measure's name.
        comparison: of first − second.
        verdict: ``"more"`` or ``"less"`` where the t interval excludes zero, otherwise ``"undecided at this n"``.
    """

    first: str
    second: str
    measure: str
    comparison: PairedComparison
    verdict: str


def measures(landscape: Landscape, *, level: float = 1.0) -> list[Measure]:
    """What is measured of a landscape.

    Args:
        landscape: of a line or plane.
        level: nats above the origin's loss below which the area is taken.

    Raises:
        DataError: a level that is not above 0.
    """
    check_level(level)
    half, whole = landscape.grid.radii
    return [
        Measure(f"rise at {half:g}", f"loss rise at {half:g} (nats)", lambda s, m: s.rises(m, half)[0]),
        Measure(f"rise at {whole:g}", f"loss rise at radius {whole:g} (nats)", lambda s, m: s.rises(m)[0]),
        Measure(f"largest rise at {whole:g}", f"largest rise at {whole:g} (nats)", lambda s, m: s.rises(m)[1]),
        Measure("curvature", "curvature at the origin (nats)", lambda s, m: s.curvatures(m)[0]),
        Measure(
            "curvature per length²",
            "curvature per squared length (nats)",
            lambda s, m: s.curvatures(m)[0] / s.lengths[list(s.masks).index(m), :, 0] ** 2,
        ),
        Measure(
            f"area below +{level:g}",
            f"{'length' if landscape.grid.dims == 1 else 'area'} less than {level:g} nats above the origin",
            lambda s, m: s.areas(m, level)[0],
        ),
    ]


def check_level(level: float) -> None:
    """Refuse a level below which there is no area.

    Raises:
        DataError: it is not above 0, or not finite.
    """
    if not 0 < level < np.inf:
        raise DataError(f"level {level:g}; expected a number of nats above 0, as 1")


def numbers(landscape: Landscape, *, level: float = 1.0) -> list[Number]:
    """Each measure of each mask."""
    found = []
    for mask, measure in itertools.product(landscape.masks, measures(landscape, level=level)):
        values = measure.of(landscape, mask)
        finite = bool(np.isfinite(values).all())
        shown = tuple(v if np.isfinite(v) else None for v in values.tolist())
        found.append(Number(mask.name, measure.name, shown, summarise(values.tolist()) if finite else None))
    return found


def differences(landscape: Landscape, *, level: float = 1.0) -> list[Difference]:
    """Top against random and against bottom, and bottom against random, of the same share: Observation 3 as a test.

    The pairs share their directions, seed by seed. Pairs of which a value is not finite are left out.
    """
    found = []
    for first, second in _pairs(landscape.masks):
        for measure in measures(landscape, level=level):
            a, b = measure.of(landscape, first), measure.of(landscape, second)
            if np.isfinite(a).all() and np.isfinite(b).all():
                compared = paired_comparison(a.tolist(), b.tolist())
                word = _WORDS.get(verdict(compared), "undecided at this n")
                found.append(Difference(first.name, second.name, measure.name, compared, word))
    return found


def as_json(landscape: Landscape, *, level: float = 1.0) -> dict[str, Any]:
    """`numbers` and `differences` as JSON."""
    return {
        "origin_loss": landscape.origin_loss if np.isfinite(landscape.origin_loss) else None,
        "level": level,
        "masks": [
            {
                "mask": mask.name,
                "moved": landscape.moved[i].tolist(),
                "lengths": landscape.lengths[i].tolist(),
                "numbers": {
                    n.measure: {"values": n.values, "summary": n.summary and asdict(n.summary)}
                    for n in numbers(landscape, level=level)
                    if n.mask == mask.name
                },
            }
            for i, mask in enumerate(landscape.masks)
        ],
        "differences": [
            {
                "first": d.first,
                "second": d.second,
                "measure": d.measure,
                "mean": d.comparison.mean,
                "t_interval": d.comparison.t_interval,
                "confidence": d.comparison.confidence,
                "values": d.comparison.differences,
                "verdict": d.verdict,
            }
            for d in differences(landscape, level=level)
        ],
    }


def _pairs(masks: Sequence[Mask]) -> list[tuple[Mask, Mask]]:
    by_name = {mask.name: mask for mask in masks}
    wanted = (("top", "random"), ("top", "bottom"), ("bottom", "random"))
    return [
        (mask, by_name[other])
        for first, second in wanted
        for mask in masks
        if mask.kind == first and (other := Mask(second, mask.share, mask.equal_norm).name) in by_name
    ]
