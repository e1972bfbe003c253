r"""Scores → rates: the less a layer knows, the more of it is dropped.

With the sites in ascending order of their Fisher score, :math:`k = 0 \dots L-1` (eqs. 6-10 of Sharma et al., 2024),

.. math:: p_k = p_{upper} - \frac{k}{L - 1}\,(p_{upper} - p_{lower}).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from guided_dropout.artefacts import read_json, write_json
from guided_dropout.errors import ArtefactError, ScheduleError, unknown
from guided_dropout.fisher.profile import FisherProfile
from guided_dropout.identity import backbone_name, model_identity
from guided_dropout.sites import GROUPINGS, DropoutSite, find_sites

KIND = "dropout-schedule"
SCHEMA = 1
UNIFORM = "uniform"

SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda rank: rank,
}
"""Shape → function from a site's rank (0 least informative … 1 most) to how far its rate falls (0 upper … 1 lower).

Each must not decrease, and maps 0 to 0 and 1 to 1.
"""


@dataclass(frozen=True)
class DropoutSchedule:
    """A dropout rate for each site of a model.

    Attributes:
        rates: path of the site on the model that the schedule was made on → rate in [0, 1).
        scores: path → Fisher score; None where there is none.
        shape: a key of `SHAPES`, or ``"uniform"``.
        grouping: how parameters were attributed to sites: ``"owner"`` or ``"dataflow"``.
        upper: highest rate asked for.
        lower: lowest rate asked for.
        model: what `identity.model_identity` says of that model, and ``"shapes"``: name (relative to the backbone) of
            each parameter that feeds a site → its shape.
        profile: which profile the scores come from; empty where there is none.
    """

    rates: Mapping[str, float]
    scores: Mapping[str, float | None]
    shape: str
    grouping: str
    upper: float
    lower: float
    model: Mapping[str, Any]
    profile: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.rates:
            raise ScheduleError("a schedule without sites; expected a rate for at least one dropout site")
        for path, rate in self.rates.items():
            check_rate(path, rate)

    @property
    def mean_rate(self) -> float:
        """Mean rate over the sites."""
        return math.fsum(self.rates.values()) / len(self.rates)

    @classmethod
    def from_profile(
        cls,
        profile: FisherProfile,
        model: nn.Module,
        *,
        upper: float = 0.1,
        lower: float = 0.0,
        shape: str = "linear",
        grouping: str = "owner",
        include_head: bool = False,
    ) -> DropoutSchedule:
        """Guided dropout: the rates fall from `upper` to `lower` as the Fisher information of the sites rises.

        A site's score is the mean, over the parameters that feed it, of each parameter's mean Fisher information.

        Args:
            profile: measured on a model with the same backbone; the head may differ.
            model: the model whose sites get rates; it is run once on a tiny batch and left as it was.
            upper: rate of the site that knows least.
            lower: rate of the site that knows most.
            shape: a key of `SHAPES`.
            grouping: which parameters feed a site: ``"owner"`` (the paper's) or ``"dataflow"``; see `DropoutSite`.
            include_head: give rates to sites outside the backbone as well. A site there whose parameters the profile
                does not hold (a new head's) has no score, takes no rank and gets `upper`.

        Raises:
            ScheduleError: rates outside [0, 1) or in the wrong order, an unknown shape or grouping, a model without
                sites, or a profile of another backbone.
            SiteError: as for `sites.trace`.
        """
        sites = _sites(model, include_head)
        scores = site_scores(profile, model, sites, grouping)
        known = {path: score for path, score in scores.items() if score is not None}
        return cls(
            rates=dict.fromkeys(scores, upper) | rates_from_scores(known, upper=upper, lower=lower, shape=shape),
            scores=scores,
            shape=shape,
            grouping=grouping,
            upper=upper,
            lower=lower,
            model=_model_facts(model, sites, grouping),
            profile=_profile_facts(profile),
        )

    @classmethod
    def uniform(cls, model: nn.Module, rate: float, include_head: bool = False) -> DropoutSchedule:
        """The same rate at each site: plain dropout.

        Raises:
            ScheduleError: a rate outside [0, 1), or a model without sites.
            SiteError: as for `sites.trace`.
        """
        sites = _sites(model, include_head)
        return cls(
            rates={site.path: rate for site in sites},
            scores={site.path: None for site in sites},
            shape=UNIFORM,
            grouping="owner",
            upper=rate,
            lower=rate,
            model=_model_facts(model, sites, "owner"),
        )

    def at_uniform(self, rate: float | None = None) -> DropoutSchedule:
        """The same sites, each at `rate`, or at this schedule's mean rate: the control for "just less dropout".

        Raises:
            ScheduleError: a rate outside [0, 1).
        """
        rate = self.mean_rate if rate is None else rate
        return replace(self, rates=dict.fromkeys(self.rates, rate), shape=UNIFORM, upper=rate, lower=rate)

    def save(self, path: str | Path) -> Path:
        """Write the schedule as one JSON file, all or nothing; return its path.

        Raises:
            ArtefactError: `path` cannot be written.
        """
        facts = {
            "kind": KIND,
            "schema": SCHEMA,
            "shape": self.shape,
            "grouping": self.grouping,
            "upper": self.upper,
            "lower": self.lower,
            "mean_rate": self.mean_rate,
            "rates": dict(self.rates),
            "scores": dict(self.scores),
            "profile": dict(self.profile),
            "model": dict(self.model),
        }
        write_json(path, facts)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> DropoutSchedule:
        """Read what `save` wrote.

        Raises:
            ArtefactError: no such file, another kind of file or schema version, or something is missing in it.
            ScheduleError: a rate outside [0, 1).
        """
        facts = read_json(path, kind=KIND, schema=SCHEMA)
        fields = ("rates", "scores", "shape", "grouping", "upper", "lower", "model", "profile")
        missing = [name for name in fields if name not in facts]
        if missing:
            raise ArtefactError(f"{path} has no {missing[0]!r}; expected a whole {KIND} file: make it again")
        return cls(**{name: facts[name] for name in fields})


def rates_from_scores(
    scores: Mapping[str, float], *, upper: float, lower: float, shape: str = "linear"
) -> dict[str, float]:
    """Rates that fall from `upper` to `lower` as the score's rank rises (eqs. 9-10).

    Args:
        scores: path → score. Equal scores are ranked by path. A single site is the least informative one and gets
            `upper`.
        upper: rate at the lowest score; reached exactly.
        lower: rate at the highest score; reached exactly.
        shape: a key of `SHAPES`.

    Returns:
        Path → rate, in the order of `scores`.

    Raises:
        ScheduleError: rates outside [0, 1) or in the wrong order, an unknown shape, or a score that is not finite.
    """
    check_rate("upper", upper)
    check_rate("lower", lower)
    if lower > upper:
        raise ScheduleError(f"lower rate {lower:g} is above upper rate {upper:g}; expected lower <= upper: swap them")
    _check_choice("shape", shape, SHAPES)
    for path, score in scores.items():
        if not math.isfinite(score):
            raise ScheduleError(f"score of {path} is {score}; expected a finite number: estimate the profile again")
    ranked = sorted(scores, key=lambda path: (scores[path], path))
    rank = {path: k / max(len(ranked) - 1, 1) for k, path in enumerate(ranked)}
    return {path: _rate(SHAPES[shape](rank[path]), upper, lower) for path in scores}


def site_scores(
    profile: FisherProfile, model: nn.Module, sites: Iterable[DropoutSite], grouping: str = "owner"
) -> dict[str, float | None]:
    """The Fisher score of each site: the mean over the parameters that feed it of each one's mean Fisher information.

    Args:
        profile: measured on a model with the same backbone.
        model: the model that `sites` were found on.
        sites: the sites to score.
        grouping: which parameters feed a site: ``"owner"`` or ``"dataflow"``.

    Returns:
        Path → score; None for a site outside the backbone whose parameters the profile does not all hold.

    Raises:
        ScheduleError: an unknown grouping, a profile of another backbone, or a site of the backbone that no parameter
            feeds.
    """
    _check_choice("grouping", grouping, GROUPINGS)
    means = _means_for(profile, model)
    return {site.path: _score(site, grouping, means, model) for site in sites}


def _rate(fallen: float, upper: float, lower: float) -> float:
    """From `upper` (fallen 0) to `lower` (fallen 1), both exact in spite of rounding."""
    return lower if fallen == 1 else max(lower, upper - fallen * (upper - lower))


def check_rate(name: str, rate: Any) -> None:
    """Refuse a rate that is not a number in [0, 1).

    Raises:
        ScheduleError: it is not.
    """
    number = isinstance(rate, int | float) and not isinstance(rate, bool)
    if not (number and 0 <= rate < 1):
        raise ScheduleError(f"dropout rate of {name} is {rate!r}; expected a number in [0, 1)")


def _check_choice(what: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ScheduleError(unknown(what, value, choices))


def _sites(model: nn.Module, include_head: bool) -> list[DropoutSite]:
    sites = [site for site in find_sites(model) if include_head or not site.in_head]
    if not sites:
        raise ScheduleError(
            f"{type(model).__name__} has no dropout site in its backbone; expected a dropout call in training mode: "
            "choose a model that has dropout, or another attn_implementation"
        )
    return sites


def _means_for(profile: FisherProfile, model: nn.Module) -> dict[str, float]:
    """Name relative to the backbone → mean Fisher information, once the profile is known to be of this backbone."""
    found, expected = profile.model.get("model_type"), model_identity(model)["model_type"]
    if found != expected:
        raise ScheduleError(
            f"a profile of another model: its model type is {found!r}, {type(model).__name__}'s is {expected!r}: "
            "estimate a profile of this model"
        )
    prefix = profile.model.get("backbone_prefix", "")
    shapes = {name.removeprefix(prefix): tuple(f.shape) for name, f in profile.diagonal.items()}
    for name, parameter in model.named_parameters():
        name = backbone_name(model, name)
        if shapes.get(name, tuple(parameter.shape)) != tuple(parameter.shape):
            raise ScheduleError(
                f"a profile of another model: {name} is {list(shapes[name])} in the profile, {list(parameter.shape)} "
                "in the model: estimate a profile of this model"
            )
    return {name.removeprefix(prefix): mean for name, mean in profile.tensor_means.items()}


def _score(site: DropoutSite, grouping: str, means: Mapping[str, float], model: nn.Module) -> float | None:
    """Mean over the group's tensors of each tensor's mean: a vector weighs as much as a matrix, as in the paper."""
    names = [backbone_name(model, name) for name in site.parameters_by(grouping)]
    missing = [name for name in names if name not in means]
    if site.in_head and (missing or not names):
        return None
    if missing:
        raise ScheduleError(
            f"the profile holds no {missing[0]}, which feeds dropout site {site.path}; expected a profile of the same "
            "backbone: estimate a profile of this model"
        )
    if not names:
        raise ScheduleError(
            f"no parameter feeds dropout site {site.path} by {grouping}; expected one or more: use the other grouping"
        )
    return math.fsum(means[name] for name in names) / len(names)


def _model_facts(model: nn.Module, sites: list[DropoutSite], grouping: str) -> dict[str, Any]:
    feeding = {name for site in sites for name in site.parameters_by(grouping)}
    shapes = {backbone_name(model, n): list(p.shape) for n, p in model.named_parameters() if n in feeding}
    return {**model_identity(model), "shapes": shapes}


def _profile_facts(profile: FisherProfile) -> dict[str, Any]:
    return {
        "objective": profile.objective,
        "reduction": profile.reduction,
        "num_samples": profile.num_samples,
        "architecture": profile.model.get("architecture"),
        "name_or_path": profile.model.get("name_or_path"),
    }
