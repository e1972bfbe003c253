"""What differs between two schedules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from scipy.stats import kendalltau, rankdata

from guided_dropout.identity import relative_name
from guided_dropout.schedule.schedule import DropoutSchedule


@dataclass(frozen=True)
class SiteChange:
    """One site in both schedules.

    Attributes:
        name: its path relative to the backbone.
        rates: its rate in the first and in the second.
        ranks: its place in each among the sites that both have, 1 the most dropped; equal rates share a mean place.
    """

    name: str
    rates: tuple[float, float]
    ranks: tuple[float, float]


@dataclass(frozen=True)
class ScheduleDiff:
    """Two schedules side by side, their sites matched relative to the backbone.

    Attributes:
        changes: the sites that both have, in the order of the first.
        only_first: names of the sites that only the first has.
        only_second: names of the sites that only the second has.
        mean_rates: mean rate of each over all of its own sites.
        tau: Kendall's tau-b of the rates that both have: 1 the same order, -1 the opposite; None where it is not
            defined: fewer than two sites, or rates that are all equal in one of them.
    """

    changes: tuple[SiteChange, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    mean_rates: tuple[float, float]
    tau: float | None


def diff(first: DropoutSchedule, second: DropoutSchedule) -> ScheduleDiff:
    """Compare two schedules; their models may have different heads around the backbone, or differ altogether."""
    a, b = _by_name(first), _by_name(second)
    shared = [name for name in a if name in b]
    pairs = [(a[name], b[name]) for name in shared]
    ranks = zip(*(rankdata([-pair[side] for pair in pairs]).tolist() for side in (0, 1)), strict=True)
    defined = all(len({pair[side] for pair in pairs}) > 1 for side in (0, 1))
    return ScheduleDiff(
        changes=tuple(SiteChange(*row) for row in zip((n for _, n in shared), pairs, ranks, strict=True)),
        only_first=tuple(name for in_head, name in a if (in_head, name) not in b),
        only_second=tuple(name for in_head, name in b if (in_head, name) not in a),
        mean_rates=(first.mean_rate, second.mean_rate),
        tau=_tau(pairs) if defined else None,
    )


def _tau(pairs: list[tuple[float, float]]) -> float:
    result: Any = kendalltau(*zip(*pairs, strict=True))
    return float(result.statistic)


def _by_name(schedule: DropoutSchedule) -> dict[tuple[bool, str], float]:
    """(In the head, path relative to the backbone) → rate."""
    prefix = schedule.model["backbone_prefix"]
    return {(not path.startswith(prefix), relative_name(path, prefix)): rate for path, rate in schedule.rates.items()}
