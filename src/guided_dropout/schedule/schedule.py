"""A dropout rate for each site of a model: made from scores, from a table, or uniform; saved and loaded."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from guided_dropout.errors import ScheduleError
from guided_dropout.fisher.profile import FisherProfile, check_profile
from guided_dropout.identity import (
    backbone_name,
    backbone_weights,
    is_packed,
    model_identity,
    same_weights,
    weights_digest,
)
from guided_dropout.schedule.files import digest, facts_of, read_schedule, write_schedule
from guided_dropout.schedule.scores import site_scores
from guided_dropout.schedule.shapes import Shape, check_rate, mean_of, rates_from_scores, shape_name, with_mean
from guided_dropout.schedule.table import read_rates
from guided_dropout.sites import DropoutSite, find_sites

UNIFORM = "uniform"
TABLE = "table"


@dataclass(frozen=True)
class DropoutSchedule:
    """A dropout rate for each site of a model.

    Attributes:
        rates: path of the site on the model that the schedule was made on → rate in [0, 1), in the order of the sites'
            first call.
        scores: path → score; None where there is none.
        shape: how scores became rates, a key of `SHAPES` with its number; ``"table"`` for rates given one by one,
            ``"uniform"`` or the name of another control.
        grouping: how parameters were attributed to sites: ``"owner"`` or ``"dataflow"``.
        upper: highest rate asked for.
        lower: lowest rate asked for.
        model: what `identity.model_identity` says of that model, ``"shapes"``: name (relative to the backbone) of each
            parameter that feeds a site → its shape, and ``"digest"`` of their values; earlier files have no digest.
        profile: which profile the scores come from; empty where there is none.
        aggregate: how a site's parameters became its score, a key of `AGGREGATES`.
        kinds: path → kind of the site, see `DropoutSite`; empty in files of schema 1, which did not keep it.
        derived_from: of a control, the schedule it was derived from (``"digest"`` and what it was) and the control's
            own facts such as a seed; otherwise empty.
    """

    rates: Mapping[str, float]
    scores: Mapping[str, float | None]
    shape: str
    grouping: str
    upper: float
    lower: float
    model: Mapping[str, Any]
    profile: Mapping[str, Any] = field(default_factory=dict)
    aggregate: str = "tensor_mean"
    kinds: Mapping[str, str] = field(default_factory=dict)
    derived_from: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.rates:
            raise ScheduleError("a schedule without sites; expected a rate for at least one dropout site")
        for path, rate in self.rates.items():
            check_rate(path, rate)

    @property
    def mean_rate(self) -> float:
        """Mean rate over the sites."""
        return mean_of(self.rates.values())

    @property
    def per_call(self) -> bool:
        """Whether there are rates for single calls of a site, ``path[0]``, ``path[1]``, …."""
        return any(path.endswith("]") for path in self.rates)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that stand for the rates and everything they were made from."""
        return digest(facts_of(self))

    def has_weights_of(self, model: nn.Module) -> bool | None:
        """Whether `model` has the weights in its backbone that this was made on; None where that cannot be told.

        It cannot where the schedule does not say, or either is in float16.
        Other weights are no error: fine-tuning changes them, and the rates stay what they are.
        """
        return same_weights(self.model.get("digest"), backbone_weights(model, self.model["shapes"]))

    def weights_note(self, model: nn.Module) -> str | None:
        """What to tell a person whose `model` has other weights than this was made on; None where there is nothing.

        Nor is there where the model is another altogether, so that its rates do not hold there: `rates_on` refuses it.
        """
        if not self._is_of(model):
            return None
        if self.profile.get("other_weights"):
            return (
                f"note: the schedule's scores are of other weights ({self.profile.get('name_or_path') or '?'}) than "
                f"the model has that it was made for ({self.model.get('name_or_path') or '?'}); its rates hold all "
                "the same"
            )
        if self.has_weights_of(model) is not False:
            return None
        return (
            f"note: the schedule was made on other weights of this backbone ({self.model.get('name_or_path') or '?'}); "
            "its rates hold all the same, its scores are of those weights"
        )

    def _is_of(self, model: nn.Module) -> bool:
        """Whether `model` is of the type that this was made on, with tensors of the same shapes."""
        here = {backbone_name(model, name): list(p.shape) for name, p in model.named_parameters()}
        shapes: Mapping[str, Any] = self.model["shapes"]
        same_type = self.model["model_type"] == model_identity(model)["model_type"]
        return same_type and all(here.get(name) == list(shape) for name, shape in shapes.items())

    @classmethod
    def from_profile(
        cls,
        profile: FisherProfile,
        model: nn.Module,
        *,
        upper: float = 0.1,
        lower: float = 0.0,
        shape: str | Shape = "linear",
        grouping: str = "owner",
        aggregate: str = "tensor_mean",
        mean_rate: float | None = None,
        include_head: bool = False,
        per_call: bool = False,
        inputs: Mapping[str, Any] | None = None,
    ) -> DropoutSchedule:
        """Guided dropout: the rates fall from `upper` to `lower` as the Fisher information of the sites rises.

        Args:
            profile: measured on a model with the same backbone; the head may differ.
            model: the model whose sites get rates; it is run once on a tiny batch and left as it was.
            upper: rate of the site that knows least.
            lower: rate of the site that knows most.
            shape: how the rate falls with the score: a key of `SHAPES`, with a number for some (``"step:3"``), or a
                function of the ascending scores.
            grouping: which parameters feed a site: ``"owner"`` (the paper's) or ``"dataflow"``; see `DropoutSite`.
            aggregate: how their Fisher values make a score: ``"tensor_mean"`` (the paper's) or another of `AGGREGATES`.
            mean_rate: multiply all rates, and the two bounds, by one number such that this is the rates' mean.
            include_head: give rates to sites outside the backbone as well. A site there whose parameters the profile
                does not hold (a new head's) has no score, takes no rank and gets `upper`.
            per_call: give each call of a knob that is used several times in a forward a rate of its own; see
                `sites.trace`.
            inputs: keyword arguments that the model is run with, where it does not run on a batch made from its
                configuration, or leaves parts out there, such as attention to an encoder's states.

        Raises:
            ScheduleError: rates outside [0, 1) or in the wrong order, an unknown shape, grouping or aggregate, values
                that the profile does not hold, a mean that would take a rate to 1, a model without sites, or a profile
                of another backbone.
            SiteError: as for `sites.trace`.
            ArtefactError: what is given for a profile is none.
        """
        sites = _sites(model, include_head, per_call, inputs)
        check_profile(profile, "DropoutSchedule.from_profile")
        scores = site_scores(profile, model, sites, grouping, aggregate)
        known = {path: score for path, score in scores.items() if score is not None}
        schedule = cls(
            rates=dict.fromkeys(scores, upper) | rates_from_scores(known, upper=upper, lower=lower, shape=shape),
            scores=scores,
            shape=shape_name(shape),
            grouping=grouping,
            upper=upper,
            lower=lower,
            model=_model_facts(model, sites, grouping),
            profile=profile_facts(profile) | _weights_facts(profile, model),
            aggregate=aggregate,
            kinds={site.path: site.kind for site in sites},
        )
        return schedule if mean_rate is None else schedule.with_mean(mean_rate)

    @classmethod
    def from_rates(
        cls, rates: Mapping[str, float] | str | Path, model: nn.Module, *, inputs: Mapping[str, Any] | None = None
    ) -> DropoutSchedule:
        """Rates given one by one.

        Args:
            rates: path of the site, on the model or relative to its backbone → rate; or a JSON or CSV file of them.
                Each site of the backbone must have one, sites of the head may.
            model: it is run once on a tiny batch and left as it was.
            inputs: as for `from_profile`.

        Raises:
            ScheduleError: a rate outside [0, 1), a path that is no site, a site without a rate, or one with two.
            ArtefactError: see `read_rates`.
            SiteError: as for `sites.trace`.
        """
        given = rates if isinstance(rates, Mapping) else read_rates(rates)
        sites = _sites(model, True, per_call=any(name.endswith("]") for name in given), inputs=inputs)
        known = {site.path: site.path for site in sites if not site.in_head}
        known = {backbone_name(model, path): path for path in known} | known
        known |= {site.path: site.path for site in sites if site.in_head}
        found: dict[str, float] = {}
        for name, rate in given.items():
            check_rate(name, rate)
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                raise ScheduleError(
                    f"{name!r} is no dropout site of {type(model).__name__}"
                    f"{f' (did you mean {near[0]!r}?)' if near else ''}; expected a path that `inspect` lists"
                )
            if known[name] in found:
                raise ScheduleError(f"two rates for the dropout site {known[name]}; expected one")
            found[known[name]] = rate
        for site in sites:
            if not (site.in_head or site.in_adapter) and site.path not in found:
                raise ScheduleError(f"no rate for the dropout site {site.path}; each site of the backbone needs one")
        sites = [site for site in sites if site.path in found]
        return cls(
            rates={site.path: found[site.path] for site in sites},
            scores={site.path: None for site in sites},
            shape=TABLE,
            grouping="owner",
            upper=max(found.values()),
            lower=min(found.values()),
            model=_model_facts(model, sites, "owner"),
            kinds={site.path: site.kind for site in sites},
        )

    @classmethod
    def uniform(
        cls, model: nn.Module, rate: float, include_head: bool = False, *, inputs: Mapping[str, Any] | None = None
    ) -> DropoutSchedule:
        """The same rate at each site: plain dropout.

        Args:
            model: it is run once on a tiny batch and left as it was.
            rate: in [0, 1).
            include_head: give it to sites outside the backbone as well.
            inputs: as for `from_profile`.

        Raises:
            ScheduleError: a rate outside [0, 1), or a model without sites.
            SiteError: as for `sites.trace`.
        """
        sites = _sites(model, include_head, inputs=inputs)
        return cls(
            rates={site.path: rate for site in sites},
            scores={site.path: None for site in sites},
            shape=UNIFORM,
            grouping="owner",
            upper=rate,
            lower=rate,
            model=_model_facts(model, sites, "owner"),
            kinds={site.path: site.kind for site in sites},
        )

    def at_uniform(self, rate: float | None = None) -> DropoutSchedule:
        """The same sites, each at `rate`, or at this schedule's mean rate: the control for "just less dropout".

        Raises:
            ScheduleError: a rate outside [0, 1).
        """
        rate = self.mean_rate if rate is None else rate
        return self.derive(UNIFORM, dict.fromkeys(self.rates, rate), upper=rate, lower=rate)

    def with_mean(self, mean: float) -> DropoutSchedule:
        """The same schedule with all rates, and the two bounds, times one number such that their mean is `mean`.

        So the amount of dropout can be set apart from how it is spread.

        Raises:
            ScheduleError: a mean outside [0, 1), one that would take a rate to 1 or above (rates are never clipped), or
                rates that are all 0.
        """
        rates = with_mean(self.rates, mean)
        factor = mean / self.mean_rate if self.mean_rate else 1.0
        return replace(self, rates=rates, upper=self.upper * factor, lower=self.lower * factor)

    def derive(self, name: str, rates: Mapping[str, float], **changes: Any) -> DropoutSchedule:
        """A control: the same sites at other rates, with this schedule named as where it comes from.

        Args:
            name: the control's, which becomes the `shape`.
            rates: path → rate, for the same sites.
            changes: other attributes; ``derived_from`` adds facts such as a seed.
        """
        source = {
            "digest": self.digest,
            "shape": self.shape,
            "grouping": self.grouping,
            "aggregate": self.aggregate,
            "mean_rate": self.mean_rate,
        }
        changes["derived_from"] = source | changes.get("derived_from", {})
        return replace(self, rates={path: rates[path] for path in self.rates}, shape=name, **changes)

    def save(self, path: str | Path) -> Path:
        """Write the schedule as one JSON file, all or nothing; return its path.

        Raises:
            ArtefactError: `path` cannot be written.
        """
        return write_schedule(path, self)

    @classmethod
    def load(cls, path: str | Path) -> DropoutSchedule:
        """Read what `save` wrote, now or in schema 1.

        Raises:
            ArtefactError: no such file, another kind of file or schema version, or something is missing in it.
            ScheduleError: a rate outside [0, 1).
        """
        return cls(**read_schedule(path))


def _sites(
    model: nn.Module, include_head: bool, per_call: bool = False, inputs: Mapping[str, Any] | None = None
) -> list[DropoutSite]:
    found = find_sites(model, inputs, per_call=per_call)
    sites = [site for site in found if include_head or not site.in_head]
    if not sites:
        raise ScheduleError(
            f"{type(model).__name__} has no dropout site in its backbone; expected a dropout call in training mode: "
            "choose a model that has dropout, or another attn_implementation"
        )
    return sites


def _model_facts(model: nn.Module, sites: list[DropoutSite], grouping: str) -> dict[str, Any]:
    feeding = {name for site in sites for name in site.parameters_by(grouping)}
    fed = {n: p for n, p in model.named_parameters() if n in feeding and not is_packed(p)}
    shapes = {backbone_name(model, n): list(p.shape) for n, p in fed.items()}
    return {**model_identity(model), "shapes": shapes, "digest": weights_digest(backbone_weights(model, shapes))}


def _weights_facts(profile: FisherProfile, model: nn.Module) -> dict[str, Any]:
    """Only where there is something to tell, so that all other schedules keep their digest."""
    return {"other_weights": True} if profile.has_weights_of(model) is False else {}


def profile_facts(profile: FisherProfile) -> dict[str, Any]:
    """Which profile: a digest of its tensors' means, and what a person knows it by."""
    return {
        "digest": digest({"means": dict(profile.tensor_means), "noise": list(profile.noise)}),
        "objective": profile.objective,
        "reduction": profile.reduction,
        "num_samples": profile.num_samples,
        "architecture": profile.model.get("architecture"),
        "name_or_path": profile.model.get("name_or_path"),
        **{name: profile.provenance.get(name) for name in ("text", "seed", "date")},
    }
