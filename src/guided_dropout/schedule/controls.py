"""Controls: schedules that say whether it is the Fisher information that helps, or something simpler.

Each has the sites and the mean rate of the schedule that it is derived from, and names it in `derived_from`. Sites
without a score beside sites with one (a new head's) keep their rates where rates are dealt out anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from guided_dropout.errors import ScheduleError
from guided_dropout.identity import backbone_name, model_identity, relative_name
from guided_dropout.schedule.places import by_role
from guided_dropout.schedule.schedule import DropoutSchedule
from guided_dropout.schedule.scores import weight_scores
from guided_dropout.schedule.shapes import mean_of, place_rates, with_mean
from guided_dropout.sites import find_sites

CONTROLS = ("uniform", "top_only", "role_mean", "reversed", "shuffled", "depth_linear", "magnitude")


def uniform(schedule: DropoutSchedule) -> DropoutSchedule:
    """The mean rate at each site: the same amount of dropout, no guidance."""
    return schedule.at_uniform()


def top_only(schedule: DropoutSchedule, k: int = 1) -> DropoutSchedule:
    """The k sites with the highest scores keep their rates, all others share the mean of theirs.

    A model's embeddings often score far above all else. A schedule that beats uniform dropout but not this control
    shows that these sites are best left alone, and nothing about the order of the others.

    Args:
        schedule: where the rates come from; where it has no scores, those with the lowest rates are kept.
        k: how many. Sites of equal score are kept in the order of their first call.

    Raises:
        ScheduleError: k below 1.
    """
    check_top(k)
    scores = _scored(schedule) or {path: -rate for path, rate in schedule.rates.items()}
    others = sorted(scores, key=scores.__getitem__, reverse=True)[k:]
    shared = dict.fromkeys(others, mean_of([schedule.rates[path] for path in others])) if others else {}
    rates = {**schedule.rates, **shared}
    return schedule.derive("top_only", rates, derived_from={"k": k})


def check_top(k: int) -> None:
    """Refuse a number of sites that `top_only` cannot keep.

    Raises:
        ScheduleError: it is below 1.
    """
    if k < 1:
        raise ScheduleError(f"k {k} of the control top-only; expected at least 1")


def check_apart(name: str, control: DropoutSchedule, schedule: DropoutSchedule) -> None:
    """Refuse a control that has the schedule's own rates, as `top_only` of all sites.

    Raises:
        ScheduleError: it has.
    """
    if control.rates == schedule.rates:
        raise ScheduleError(
            f"the control {name} is the schedule itself: the same rate at each of {len(schedule.rates)} sites, so that "
            "a comparison would say nothing; expected another control"
            + (f", or k below {len(schedule.rates) - 1}" if control.derived_from.get("k", 0) > 1 else "")
        )


def role_mean(schedule: DropoutSchedule) -> DropoutSchedule:
    """Each role's mean rate in all of its layers: guidance knows the kind of site, but no longer the layer.

    A role is the same place in each layer, such as the dropout on attention probabilities; see `places.places`.
    Fisher scores often differ more between roles than between layers, so that much of a schedule is this control.
    """
    roles = by_role(schedule.rates)
    means = {role: mean_of([schedule.rates[path] for path in paths]) for role, paths in roles.items()}
    rates = {path: means[role] for role, paths in roles.items() for path in paths}
    return schedule.derive("role_mean", rates)


def reversed(schedule: DropoutSchedule) -> DropoutSchedule:  # noqa: A001
    """The same rates, dealt out the wrong way round: the site that knows most gets the highest.

    Where the schedule has no scores the site with the lowest rate gets the highest.
    """
    order = _scored(schedule) or {path: -rate for path, rate in schedule.rates.items()}
    return schedule.derive("reversed", _dealt_anew(schedule, {path: -score for path, score in order.items()}))


def shuffled(schedule: DropoutSchedule, seed: int = 0) -> DropoutSchedule:
    """The same rates, dealt out by chance: the same spread of rates, guidance by nothing.

    Args:
        schedule: where the rates come from.
        seed: of NumPy's default generator; the same seed gives the same permutation of the sites.

    Raises:
        ScheduleError: a seed below 0.
    """
    check_seed(seed)
    paths = list(_scored(schedule) or schedule.rates)
    drawn = np.random.default_rng(seed).permutation(len(paths))
    rates = {path: schedule.rates[paths[i]] for path, i in zip(paths, drawn, strict=True)}
    return schedule.derive("shuffled", {**schedule.rates, **rates}, derived_from={"seed": seed})


def check_seed(seed: int) -> None:
    """Refuse a seed that `shuffled` cannot draw with.

    Raises:
        ScheduleError: it is below 0.
    """
    if seed < 0:
        raise ScheduleError(f"seed {seed} of the control shuffled; expected a whole number from 0")


def depth_linear(schedule: DropoutSchedule) -> DropoutSchedule:
    r"""Rates that rise with depth, without Fisher information.

    With the sites in the order of their first call, :math:`k = 0 \dots L-1`, the rate is
    :math:`p_{min} + k\,(p_{max} - p_{min}) / (L - 1)`, from their lowest rate to their highest, times one number such
    that their mean stays; of a linear schedule's rates it is a permutation. Early layers are kept, as with stochastic
    depth (Huang et al., 2016).

    Raises:
        ScheduleError: that number would take a rate to 1 or above.
    """
    scored = _scored(schedule) or schedule.rates
    rates = {path: rate for path, rate in schedule.rates.items() if path in scored}
    low, high = min(rates.values()), max(rates.values())
    steps = max(len(rates) - 1, 1)
    ramp = {path: low + k / steps * (high - low) for k, path in enumerate(rates)}
    return schedule.derive(
        "depth_linear",
        {**schedule.rates, **with_mean(ramp, mean_of(rates.values()))},
        scores=dict.fromkeys(schedule.rates),
        profile={},
    )


def magnitude(
    schedule: DropoutSchedule, model: nn.Module, *, inputs: Mapping[str, Any] | None = None
) -> DropoutSchedule:
    """The same rates, dealt out by the size of the weights: the site with the largest weights gets the lowest.

    A site's score is the schedule's aggregate, over the same parameters, of the squares of the weights.

    Args:
        schedule: where the rates come from.
        model: holds the pretrained weights; its head may differ. It is run once on a tiny batch and left as it was.
        inputs: as for `DropoutSchedule.from_profile`.

    Raises:
        ScheduleError: a model of another backbone.
        SiteError: as for `sites.trace`.
    """
    found, expected = model_identity(model)["model_type"], schedule.model["model_type"]
    sites = [site for site in find_sites(model, inputs, per_call=schedule.per_call) if not site.in_head]
    prefix = schedule.model["backbone_prefix"]
    wanted = {path: relative_name(path, prefix) for path in schedule.rates if path.startswith(prefix)}
    # A schedule need not hold the sites of adapters, which came later.
    sites = [s for s in sites if not s.in_adapter or backbone_name(model, s.path) in wanted.values()]
    by_name = weight_scores(model, sites, schedule.grouping, schedule.aggregate)
    scores = {backbone_name(model, path): score for path, score in by_name.items()}
    if found != expected or set(wanted.values()) != set(scores):
        raise ScheduleError(
            f"{type(model).__name__} (model type {found!r}) has other dropout sites than the schedule, which was made "
            f"on {schedule.model.get('architecture')} ({expected!r}); expected a model with the same backbone"
        )
    sizes = {path: score for path, name in wanted.items() if (score := scores[name]) is not None}
    kept = {path: None for path in schedule.rates if path not in sizes}
    return schedule.derive("magnitude", _dealt_anew(schedule, sizes), scores={**sizes, **kept}, profile={})


def _scored(schedule: DropoutSchedule) -> dict[str, float]:
    return {path: score for path in schedule.rates if (score := schedule.scores.get(path)) is not None}


def _dealt_anew(schedule: DropoutSchedule, scores: Mapping[str, float]) -> dict[str, float]:
    """The rates of the sites in `scores`, the highest to the lowest score; all other sites keep theirs."""
    rates = sorted((schedule.rates[path] for path in scores), reverse=True)
    return {**schedule.rates, **place_rates(scores, rates)}
