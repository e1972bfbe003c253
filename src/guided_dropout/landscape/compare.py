"""Numbers beside the pictures, with intervals over the directions' seeds; and masks compared seed by seed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from guided_dropout.errors import DataError
from guided_dropout.landscape.curvature import ROUNDING
from guided_dropout.landscape.landscape import Landscape
from guided_dropout.landscape.masks import Mask
from guided_dropout.stats import ArmSummary, PairedComparison, paired_comparison, summarise, verdict

_Values = npt.NDArray[np.float64]
# A curvature is not resolved where rounding may be this share of it.
_TOO_ROUGH = 0.5
# An area is not resolved where smooth and straight lines between the points make it differ by this share.
_TOO_COARSE = 0.1
_WORDS = {"helps": "more", "hurts": "less"}


@dataclass(frozen=True)
class Measure:
    """One number of a landscape.

    Attributes:
        name: as JSON names it.
        title: for people, with its unit.
        of: landscape and mask → what was found.
    """

    name: str
    title: str
    of: Callable[[Landscape, Mask], Found]


@dataclass(frozen=True)
class Found:
    """A measure of one mask.

    Attributes:
        values: one per seed.
        errors: about how far each may be off; None where the number is as exact as the losses.
        within: the share of a value that its error must stay below.
        at_least: whether each is a lower bound.
    """

    values: _Values
    errors: _Values | None = None
    within: float = 0.0
    at_least: npt.NDArray[np.bool_] | None = None

    @property
    def why_not(self) -> str | None:
        """Why there is no number for people: ``"not finite"``, ``"not resolved"``; None where there is one."""
        if not np.isfinite(self.values).all():
            return "not finite"
        off = self.errors is not None and (self.errors > self.within * np.abs(self.values)).any()
        return "not resolved" if off else None


@dataclass(frozen=True)
class Number:
    """A measure of one mask over the seeds.

    Attributes:
        mask: its name.
        measure: its name.
        values: one per seed; None where it is not finite.
        summary: mean, quartiles and t interval; None where a value is not finite, or its error too large a share of it.
        errors: about how far each value may be off; None where it is as exact as the losses.
        at_least: whether a value is a lower bound.
        why_not: see `Found`.
    """

    mask: str
    measure: str
    values: tuple[float | None, ...]
    summary: ArmSummary | None
    errors: tuple[float | None, ...] | None = None
    at_least: bool = False
    why_not: str | None = None


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
        Measure(f"rise at {half:g}", f"loss rise at {half:g} (nats)", lambda s, m: Found(s.rises(m, half)[0])),
        Measure(f"rise at {whole:g}", f"loss rise at radius {whole:g} (nats)", lambda s, m: Found(s.rises(m)[0])),
        Measure(f"largest rise at {whole:g}", f"largest rise at {whole:g} (nats)", lambda s, m: Found(s.rises(m)[1])),
        Measure("curvature", "curvature at the origin (nats)", lambda s, m: _curvature(s, m, per_length=False)),
        Measure(
            "curvature per length²",
            "curvature per squared length (nats)",
            lambda s, m: _curvature(s, m, per_length=True),
        ),
        Measure(
            f"area below +{level:g}",
            f"{'length' if landscape.grid.dims == 1 else 'area'} less than {level:g} nats above the origin",
            lambda s, m: _area(s, m, level),
        ),
    ]


def _curvature(landscape: Landscape, mask: Mask, *, per_length: bool) -> Found:
    """From the step of the mask itself or of the same one stretched, whichever shows it better: they are one line."""
    lengths = {m: landscape.lengths[i, :, 0] for i, m in enumerate(landscape.masks)}
    found = []
    for same in (mask, replace(mask, equal_norm=not mask.equal_norm)):
        if same in lengths:
            value, apart = landscape.curvatures(same)
            found.append((value / lengths[same] ** 2, ROUNDING * apart / lengths[same] ** 2))
    (values, errors), *other = found
    for better, its_errors in other:
        take = its_errors * np.abs(values) < errors * np.abs(better)
        values, errors = np.where(take, better, values), np.where(take, its_errors, errors)
    scale = 1.0 if per_length else lengths[mask] ** 2
    return Found(values * scale, errors * scale, _TOO_ROUGH)


def _area(landscape: Landscape, mask: Mask, level: float) -> Found:
    values, edge = landscape.areas(mask, level)
    apart = np.abs(values - landscape.areas(mask, level, smooth=False)[0])
    return Found(values, apart, _TOO_COARSE, edge)


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
        one = measure.of(landscape, mask)
        summary = summarise(one.values.tolist()) if one.why_not is None else None
        errors = None if one.errors is None else _finite(one.errors)
        at_least = one.at_least is not None and bool(one.at_least.any())
        found.append(Number(mask.name, measure.name, _finite(one.values), summary, errors, at_least, one.why_not))
    return found


def _finite(values: _Values) -> tuple[float | None, ...]:
    return tuple(v if np.isfinite(v) else None for v in values.tolist())


def differences(landscape: Landscape, *, level: float = 1.0) -> list[Difference]:
    """Top against random and against bottom, and bottom against random, of the same share: Observation 3 as a test.

    The pairs share their directions, seed by seed. Pairs are left out of which a value is not finite, not resolved, or
    a lower bound.
    """
    found = []
    for first, second in _pairs(landscape.masks):
        for measure in measures(landscape, level=level):
            pair = [measure.of(landscape, mask) for mask in (first, second)]
            if all(one.why_not is None and (one.at_least is None or not one.at_least.any()) for one in pair):
                compared = paired_comparison(*(one.values.tolist() for one in pair))
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
                    n.measure: {
                        "values": n.values,
                        "errors": n.errors,
                        "at_least": n.at_least,
                        "why_not": n.why_not,
                        "summary": n.summary and asdict(n.summary),
                    }
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
