from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import FAMILIES, classifier_of, config_of, language_model, profile_of
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from guided_dropout.errors import ArtefactError, ScheduleError
from guided_dropout.schedule import DropoutSchedule, rates_from_scores, site_scores
from guided_dropout.sites import find_sites

finite = st.floats(allow_nan=False, allow_infinity=False)
score_maps = st.dictionaries(st.text(min_size=1, max_size=5), finite, min_size=1, max_size=40)
bounds = st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)).map(sorted)


@given(scores=score_maps, bounds=bounds)
def test_rates_fall_from_upper_to_lower_as_scores_rise(scores: dict[str, float], bounds: list[float]) -> None:
    lower, upper = bounds
    rates = rates_from_scores(scores, upper=upper, lower=lower)
    assert list(rates) == list(scores)
    ranked = sorted(scores, key=lambda path: (scores[path], path))
    assert rates[ranked[0]] == upper
    if len(scores) > 1:
        assert rates[ranked[-1]] == lower
    in_order = [rates[path] for path in ranked]
    assert in_order == sorted(in_order, reverse=True)
    if len(scores) > 2:
        step = (upper - lower) / (len(scores) - 1)
        assert in_order == pytest.approx([upper - k * step for k in range(len(scores))], abs=1e-12)


@given(scores=score_maps, bounds=bounds, data=st.data())
def test_a_permutation_of_the_sites_permutes_the_rates(
    scores: dict[str, float], bounds: list[float], data: st.DataObject
) -> None:
    lower, upper = bounds
    shuffled = {path: scores[path] for path in data.draw(st.permutations(list(scores)))}
    assert rates_from_scores(shuffled, upper=upper, lower=lower) == rates_from_scores(scores, upper=upper, lower=lower)


def test_the_formula_of_the_paper() -> None:
    rates = rates_from_scores({"a": 3.0, "b": 1.0, "c": 2.0, "d": 9.0, "e": 4.0}, upper=0.1, lower=0.02)
    assert rates == pytest.approx({"b": 0.1, "c": 0.08, "a": 0.06, "e": 0.04, "d": 0.02}, abs=1e-15)


def test_equal_scores_are_ranked_by_path_and_a_single_site_gets_upper() -> None:
    assert rates_from_scores({"b": 1.0, "a": 1.0}, upper=0.5, lower=0.1) == {"b": 0.1, "a": 0.5}
    assert rates_from_scores({"a": 1.0}, upper=0.5, lower=0.1) == {"a": 0.5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"upper": 1.0}, r"upper is 1.0; expected a number in \[0, 1\)"),
        ({"lower": -0.1}, "lower is -0.1"),
        ({"upper": math.nan}, "upper is nan"),
        ({"upper": math.inf}, "upper is inf"),
        ({"upper": True}, "upper is True"),
        ({"upper": 0.1, "lower": 0.2}, "lower rate 0.2 is above upper rate 0.1"),
        ({"shape": "liner"}, "unknown shape 'liner'.*did you mean 'linear'"),
    ],
)
def test_impossible_rates_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        rates_from_scores({"a": 1.0, "b": 2.0}, **{"upper": 0.1, "lower": 0.0, **options})


def test_a_score_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ScheduleError, match="score of b is nan"):
        rates_from_scores({"a": 1.0, "b": math.nan}, upper=0.1, lower=0.0)


def test_a_score_is_the_mean_over_tensors_whatever_their_size() -> None:
    model = language_model("bert")
    site = find_sites(model)[1]
    profile = profile_of(model, **dict(zip(site.parameters, [1.0, 2.0, 3.0, 4.0, 5.0, 9.0], strict=True)))
    assert site_scores(profile, model, [site]) == {site.path: 4.0}
    by_flow = [profile.tensor_means[name] for name in site.dataflow]
    assert site_scores(profile, model, [site], "dataflow") == {site.path: sum(by_flow) / len(by_flow)}


@pytest.mark.parametrize("grouping", ["owner", "dataflow"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_profile_serves_every_model_with_the_same_backbone(family: str, grouping: str) -> None:
    model, classifier = language_model(family), classifier_of(family)
    there = DropoutSchedule.from_profile(profile_of(model), model, grouping=grouping)
    here = DropoutSchedule.from_profile(profile_of(model), classifier, grouping=grouping)
    assert list(here.rates.values()) == list(there.rates.values())
    assert list(here.scores.values()) == list(there.scores.values())
    assert here.model["shapes"] == there.model["shapes"]
    assert here.mean_rate == pytest.approx(0.05)
    back = DropoutSchedule.from_profile(profile_of(classifier), model, grouping=grouping)
    assert list(back.rates) == list(there.rates)


def test_a_new_head_has_no_score_and_takes_no_rank() -> None:
    model, classifier = language_model("bert"), classifier_of("bert")
    schedule = DropoutSchedule.from_profile(profile_of(model), classifier, upper=0.3, include_head=True)
    assert schedule.scores["dropout"] is None
    assert schedule.rates["dropout"] == 0.3
    without = DropoutSchedule.from_profile(profile_of(model), classifier, upper=0.3)
    assert {path: r for path, r in schedule.rates.items() if path != "dropout"} == without.rates
    own = DropoutSchedule.from_profile(profile_of(classifier), classifier, include_head=True)
    assert own.scores["dropout"] is not None


def test_a_profile_of_another_model_is_refused() -> None:
    model = language_model("bert")
    profile = profile_of(model)
    with pytest.raises(ScheduleError, match="model type is 'roberta', BertForMaskedLM's is 'bert'"):
        DropoutSchedule.from_profile(profile_of(language_model("roberta")), model)
    with pytest.raises(
        ScheduleError, match=r"embeddings.word_embeddings.weight is \[64, 16\] in the profile, \[64, 24\]"
    ):
        DropoutSchedule.from_profile(profile, language_model("bert", hidden_size=24))
    with pytest.raises(ScheduleError, match=r"holds no encoder.layer.2.attention.self.query.weight, which feeds"):
        DropoutSchedule.from_profile(profile, language_model("bert", num_hidden_layers=3))


def test_means_are_all_that_is_needed() -> None:
    model = language_model("bert")
    profile = profile_of(model)
    assert DropoutSchedule.from_profile(replace(profile, diagonal={}), model) == DropoutSchedule.from_profile(
        profile, model
    )


def test_wrong_choices_and_models_without_dropout_are_refused() -> None:
    model = language_model("bert")
    with pytest.raises(ScheduleError, match=r"unknown grouping 'data-flow'.*did you mean 'dataflow'"):
        DropoutSchedule.from_profile(profile_of(model), model, grouping="data-flow")
    with pytest.raises(ScheduleError, match=r"embeddings.dropout is 1.5; expected a number"):
        DropoutSchedule.uniform(model, 1.5)
    with pytest.raises(ScheduleError, match=r"Plain has no dropout site in its backbone.*choose a model"):
        DropoutSchedule.uniform(Plain(), 0.1)


class Plain(nn.Embedding):
    """A model of tokens without any dropout."""

    def __init__(self) -> None:
        super().__init__(8, 2)
        self.config = config_of("bert")

    def get_input_embeddings(self) -> nn.Module:
        return self

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids)


def test_uniform_and_at_uniform() -> None:
    model = language_model("gpt2")
    schedule = DropoutSchedule.from_profile(profile_of(model), model, upper=0.2, lower=0.1)
    flat = schedule.at_uniform()
    assert flat.mean_rate == pytest.approx(schedule.mean_rate) == pytest.approx(0.15)
    assert set(flat.rates.values()) == {schedule.mean_rate}
    assert (flat.shape, list(flat.rates)) == ("uniform", list(schedule.rates))
    assert set(schedule.at_uniform(0.0).rates.values()) == {0.0}
    assert DropoutSchedule.uniform(model, 0.3).rates == schedule.at_uniform(0.3).rates
    with pytest.raises(ScheduleError, match="expected a number"):
        schedule.at_uniform(-1)


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    model = classifier_of("t5")
    for schedule in (
        DropoutSchedule.from_profile(profile_of(language_model("t5")), model, include_head=True),
        DropoutSchedule.uniform(model, 0.1),
    ):
        path = schedule.save(tmp_path / "new" / "schedule.json")
        assert DropoutSchedule.load(path) == schedule


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = DropoutSchedule.uniform(language_model("llama"), 0.1).save(tmp_path / "schedule.json")
    whole = json.loads(path.read_text())

    def load(**changes: object) -> None:
        path.write_text(json.dumps({k: v for k, v in {**whole, **changes}.items() if v is not None}))
        DropoutSchedule.load(path)

    with pytest.raises(ArtefactError, match="has no 'model'"):
        load(model=None)
    with pytest.raises(ArtefactError, match="schema version 2"):
        load(schema=2)
    with pytest.raises(ArtefactError, match="expected 'dropout-schedule'"):
        load(kind="fisher-profile")
    with pytest.raises(ScheduleError, match=r"self_attn.attention_dropout is 1.5"):
        load(rates=dict.fromkeys(whole["rates"], 1.5))
    with pytest.raises(ScheduleError, match="without sites"):
        load(rates={})
