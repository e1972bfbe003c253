from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families import language_model, profile_of
from random_profiles import random_profile

from guided_dropout.errors import ScheduleError
from guided_dropout.identity import in_head
from guided_dropout.schedule import AGGREGATES, DropoutSchedule, site_scores
from guided_dropout.sites import find_sites


def oracle(aggregate: str, tensors: list[torch.Tensor], everything: list[torch.Tensor]) -> float:
    flat = torch.cat([t.double().flatten() for t in tensors])
    if aggregate == "tensor_mean":
        return sum(float(t.double().mean()) for t in tensors) / len(tensors)
    if aggregate == "parameter_mean":
        return float(flat.mean())
    if aggregate == "sum":
        return float(flat.sum())
    if aggregate == "max":
        return float(flat.max())
    values = torch.cat([t.double().flatten() for t in everything]).sort(descending=True).values
    size = -(-len(values) // 100)
    return float((flat >= values[size - 1]).sum()) / size


@pytest.mark.parametrize("grouping", ["owner", "dataflow"])
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_each_aggregate_is_its_formula(aggregate: str, grouping: str) -> None:
    model = language_model("bert")
    profile = random_profile(model)
    sites = find_sites(model)
    expected = {
        site.path: oracle(
            aggregate,
            [profile.diagonal[name] for name in site.parameters_by(grouping)],
            list(profile.diagonal.values()),
        )
        for site in sites
    }
    found = site_scores(profile, model, sites, grouping, aggregate)
    assert found == pytest.approx(expected, rel=1e-9)
    assert len(set(found.values())) > 3


def test_a_score_is_the_mean_over_tensors_whatever_their_size() -> None:
    model = language_model("bert")
    site = find_sites(model)[1]
    profile = profile_of(model, **dict(zip(site.parameters, [1.0, 2.0, 3.0, 4.0, 5.0, 9.0], strict=True)))
    assert site_scores(profile, model, [site]) == {site.path: 4.0}


def test_means_are_enough_for_means_and_sums() -> None:
    model = language_model("bert")
    profile = random_profile(model)
    shapes = {name: tuple(t.shape) for name, t in profile.diagonal.items()}
    bare = replace(profile, diagonal={}, **({"shapes": shapes} if hasattr(profile, "shapes") else {}))
    sites = find_sites(model)
    for aggregate in ("tensor_mean", "parameter_mean", "sum"):
        whole = site_scores(profile, model, sites, aggregate=aggregate)
        assert site_scores(bare, model, sites, aggregate=aggregate) == whole
    for aggregate in ("max", "top_share"):
        with pytest.raises(ScheduleError, match=rf"{aggregate} needs the Fisher value of each.*use tensor_mean"):
            DropoutSchedule.from_profile(bare, model, aggregate=aggregate)


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_noise_is_in_no_score(aggregate: str) -> None:
    model = language_model("bert")
    noise = [name for name, _ in model.named_parameters() if name.endswith("key.bias")]
    profile = random_profile(model)
    for name in noise:  # so large that one of them alone would decide
        profile.diagonal[name].fill_(1e12)
        profile.tensor_means[name] = 1e12
    object.__setattr__(profile, "noise", noise)
    sites = find_sites(model)
    found = site_scores(profile, model, sites, aggregate=aggregate)
    rest = [t for name, t in profile.diagonal.items() if name not in noise]
    for site in sites:
        tensors = [profile.diagonal[name] for name in site.parameters if name not in noise]
        assert found[site.path] == pytest.approx(oracle(aggregate, tensors, rest), rel=1e-9)


def test_a_site_that_only_noise_feeds_is_refused() -> None:
    model = language_model("bert")
    profile = random_profile(model)
    site = find_sites(model)[1]
    object.__setattr__(profile, "noise", list(site.parameters))
    with pytest.raises(ScheduleError, match=rf"no parameter with a gradient feeds dropout site {site.path} by owner"):
        site_scores(profile, model, [site])


def test_zeros_are_not_in_the_top() -> None:
    model = language_model("bert")
    profile = random_profile(model)
    for tensor in profile.diagonal.values():
        tensor.zero_()
    sites = find_sites(model)
    assert set(site_scores(profile, model, sites, aggregate="top_share").values()) == {0.0}
    first = next(name for name, _ in model.named_parameters() if not in_head(model, name))
    profile.diagonal[first][0, 0] = 1.0
    found = site_scores(profile, model, sites, aggregate="top_share")
    assert [found[s.path] for s in sites] == [float(first in s.parameters) for s in sites]


def test_unknown_names_are_refused() -> None:
    model = language_model("bert")
    with pytest.raises(ScheduleError, match=r"unknown grouping 'data-flow'.*did you mean 'dataflow'"):
        DropoutSchedule.from_profile(profile_of(model), model, grouping="data-flow")
    with pytest.raises(ScheduleError, match=r"unknown aggregate 'mean'"):
        DropoutSchedule.from_profile(profile_of(model), model, aggregate="mean")


def test_equal_values_at_the_edge_of_the_top_count_wherever_they_stand() -> None:
    model = language_model("bert")
    profile = random_profile(model)
    for tensor in profile.diagonal.values():
        tensor.fill_(1.0)
    sites = find_sites(model)
    whole = sum(t.numel() for t in profile.diagonal.values())
    found = site_scores(profile, model, sites, aggregate="top_share")
    for site in sites:
        own = sum(profile.diagonal[name].numel() for name in site.parameters)
        assert found[site.path] == pytest.approx(own / whole)
