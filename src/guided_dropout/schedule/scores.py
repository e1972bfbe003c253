"""The score of a dropout site: one number for the parameters that feed it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from guided_dropout.errors import ScheduleError
from guided_dropout.fisher.profile import FisherProfile
from guided_dropout.fisher.topk import select
from guided_dropout.identity import backbone_name, is_packed, model_identity, relative_name
from guided_dropout.schedule.shapes import check_choice
from guided_dropout.sites import GROUPINGS, DropoutSite

TOP_FRACTION = 0.01


@dataclass(frozen=True)
class _Measure:
    """What is known of a model's parameters, by name relative to the backbone.

    Attributes:
        means: mean value of each tensor.
        sizes: number of elements of each tensor.
        values: name → the values, one an element; None where only the means were kept.
        noise: tensors whose values are rounding errors; no score counts them.
    """

    means: Mapping[str, float]
    sizes: Mapping[str, int]
    values: Mapping[str, torch.Tensor] | None
    noise: frozenset[str] = frozenset()

    def total(self, name: str) -> float:
        return self.means[name] * self.sizes[name]

    @functools.cached_property
    def top_counts(self) -> dict[str, int]:
        """How many of the model's top `TOP_FRACTION` of the parameters lie in each tensor."""
        assert self.values is not None
        names = [name for name in self.means if name not in self.noise]
        size = sum(self.sizes[name] for name in names)
        least = select(self.values, math.ceil(TOP_FRACTION * size) / max(size, 1), exclude=self.noise).threshold
        # Not the selection's own counts: where values tie, their places must not decide.
        return {name: int(((v := self.values[name]).ge(least) & v.gt(0)).sum()) for name in names}


def _tensor_mean(measure: _Measure, names: Sequence[str]) -> float:
    return math.fsum(measure.means[name] for name in names) / len(names)


def _parameter_mean(measure: _Measure, names: Sequence[str]) -> float:
    return _sum(measure, names) / sum(measure.sizes[name] for name in names)


def _sum(measure: _Measure, names: Sequence[str]) -> float:
    return math.fsum(measure.total(name) for name in names)


def _max(measure: _Measure, names: Sequence[str]) -> float:
    assert measure.values is not None
    return max(float(measure.values[name].max()) for name in names)


def _top_share(measure: _Measure, names: Sequence[str]) -> float:
    whole = sum(measure.top_counts.values())
    return sum(measure.top_counts[name] for name in names) / whole if whole else 0.0


AGGREGATES: dict[str, Callable[[_Measure, Sequence[str]], float]] = {
    "tensor_mean": _tensor_mean,
    "parameter_mean": _parameter_mean,
    "sum": _sum,
    "max": _max,
    "top_share": _top_share,
}
r"""Name → score of a site, from the values :math:`F_j` of the tensors :math:`t \in T` that feed it.

* ``tensor_mean``: :math:`\frac1{|T|}\sum_t \frac1{|t|}\sum_{j \in t} F_j`, the paper's: a vector weighs as much as a
  matrix.
* ``parameter_mean``: :math:`\sum_t \sum_{j \in t} F_j / \sum_t |t|`.
* ``sum``: :math:`\sum_t \sum_{j \in t} F_j`.
* ``max``: :math:`\max_{t,\, j \in t} F_j`.
* ``top_share``: the share that lies in :math:`T` of the model's top 1 % of the parameters: those above 0 and no less
  than the value at that place in descending order, a head's included.

The last two need the value of each parameter.
"""
_OF_VALUES = ("max", "top_share")


def site_scores(
    profile: FisherProfile,
    model: nn.Module,
    sites: Iterable[DropoutSite],
    grouping: str = "owner",
    aggregate: str = "tensor_mean",
) -> dict[str, float | None]:
    """The Fisher score of each site, from the parameters that feed it.

    Tensors that the profile calls noise (their true gradient is zero) are left out of every score.

    Args:
        profile: measured on a model with the same backbone.
        model: the model that `sites` were found on.
        sites: the sites to score.
        grouping: which parameters feed a site: ``"owner"`` or ``"dataflow"``.
        aggregate: a key of `AGGREGATES`.

    Returns:
        Path → score; None for a site outside the backbone whose parameters the profile does not all hold.

    Raises:
        ScheduleError: an unknown grouping or aggregate, a profile of another backbone or without the values that the
            aggregate needs, or a site of the backbone that no parameter feeds.
    """
    check_choice("grouping", grouping, GROUPINGS)
    check_choice("aggregate", aggregate, AGGREGATES)
    measure = _of_profile(profile, model)
    if aggregate in _OF_VALUES and measure.values is None:
        raise ScheduleError(
            f"aggregate {aggregate} needs the Fisher value of each parameter, and this profile holds only the means "
            "of the tensors: use tensor_mean, parameter_mean or sum, or estimate a profile that keeps the values"
        )
    return {site.path: _score(site, grouping, AGGREGATES[aggregate], measure, model) for site in sites}


def weight_scores(
    model: nn.Module, sites: Iterable[DropoutSite], grouping: str = "owner", aggregate: str = "tensor_mean"
) -> dict[str, float | None]:
    """The same scores with the squares of the model's weights in the place of their Fisher values.

    Arguments and errors as for `site_scores`. A new head is scored as well.
    """
    check_choice("grouping", grouping, GROUPINGS)
    check_choice("aggregate", aggregate, AGGREGATES)
    squares = _Squares({backbone_name(model, name): p.detach() for name, p in model.named_parameters()})
    measure = _Measure(
        means={name: float(values.mean()) for name, values in squares.items()},
        sizes={backbone_name(model, name): p.numel() for name, p in model.named_parameters()},
        values=squares,
    )
    return {site.path: _score(site, grouping, AGGREGATES[aggregate], measure, model) for site in sites}


class _Squares(Mapping[str, torch.Tensor]):
    """The squares of tensors in float64 on the CPU, each made when it is asked for."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self._tensors = tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name].to("cpu", torch.float64).square()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _of_profile(profile: FisherProfile, model: nn.Module) -> _Measure:
    """The profile's values, once it is known to be of this backbone."""
    found, expected = profile.model.get("model_type"), model_identity(model)["model_type"]
    if found != expected:
        raise ScheduleError(
            f"a profile of another model: its model type is {found!r}, {type(model).__name__}'s is {expected!r}: "
            "estimate a profile of this model"
        )
    prefix = profile.model.get("backbone_prefix", "")
    shapes = {relative_name(name, prefix): shape for name, shape in profile.shapes.items()}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    for name, parameter in model.named_parameters():
        if is_packed(parameter):
            continue
        name = backbone_name(model, name)
        sizes[name] = parameter.numel()
        if shapes.get(name, tuple(parameter.shape)) != tuple(parameter.shape):
            raise ScheduleError(
                f"a profile of another model: {name} is {list(shapes[name])} in the profile, {list(parameter.shape)} "
                "in the model: estimate a profile of this model"
            )
    values = {relative_name(name, prefix): f for name, f in profile.diagonal.items()}
    return _Measure(
        means={relative_name(name, prefix): mean for name, mean in profile.tensor_means.items()},
        sizes=sizes,
        values=values if len(values) == len(profile.tensor_means) else None,
        noise=frozenset(relative_name(name, prefix) for name in profile.noise),
    )


def _score(
    site: DropoutSite,
    grouping: str,
    aggregate: Callable[[_Measure, Sequence[str]], float],
    measure: _Measure,
    model: nn.Module,
) -> float | None:
    names = list(dict.fromkeys(backbone_name(model, name) for name in site.parameters_by(grouping)))
    missing = [name for name in names if name not in measure.means]
    known = [name for name in names if name not in measure.noise]
    if site.in_head and (missing or not known):
        return None
    if missing:
        raise ScheduleError(
            f"the profile holds no {missing[0]}, which feeds dropout site {site.path}; expected a profile of the same "
            "backbone: estimate a profile of this model"
        )
    if not known:
        raise ScheduleError(
            f"no parameter{' with a gradient' if names else ''} feeds dropout site {site.path} by {grouping}; expected "
            "one or more: use the other grouping"
        )
    return aggregate(measure, known)
