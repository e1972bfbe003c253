from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import FAMILIES, classifier_of, config_of, language_model, profile_of
from torch import nn

from guided_dropout.errors import ArtefactError, ScheduleError
from guided_dropout.schedule import DropoutSchedule, controls


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


def test_impossible_rates_and_models_without_dropout_are_refused() -> None:
    model = language_model("bert")
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


def test_a_mean_rate_scales_rates_and_bounds() -> None:
    model, classifier = language_model("bert"), classifier_of("bert")
    profile = profile_of(model)
    plain = DropoutSchedule.from_profile(profile, model, upper=0.1, lower=0.02)
    schedule = DropoutSchedule.from_profile(profile, model, upper=0.1, lower=0.02, mean_rate=0.15)
    assert schedule.mean_rate == pytest.approx(0.15, rel=1e-12)
    assert (schedule.upper, schedule.lower) == pytest.approx((0.25, 0.05))
    assert schedule.rates == pytest.approx({path: 2.5 * rate for path, rate in plain.rates.items()})
    assert schedule == plain.with_mean(0.15)
    whole = DropoutSchedule.from_profile(profile, classifier, include_head=True, mean_rate=0.15)
    assert whole.mean_rate == pytest.approx(0.15, rel=1e-12)
    assert whole.rates["dropout"] == whole.upper == max(whole.rates.values())
    with pytest.raises(ScheduleError, match=r"mean rate 0.8 would need a rate of 1.333.*choose a mean rate below 0.6,"):
        DropoutSchedule.from_profile(profile, model, upper=0.1, lower=0.02, mean_rate=0.8)


def test_what_it_was_made_from_is_told() -> None:
    model = language_model("bert")
    profile = replace(profile_of(model), provenance={"text": "some.txt", "seed": 4, "date": "2026-01-01", "other": 1})
    schedule = DropoutSchedule.from_profile(profile, model, shape="step:3", grouping="dataflow", aggregate="max")
    assert (schedule.shape, schedule.grouping, schedule.aggregate) == ("step:3", "dataflow", "max")
    assert schedule.kinds["bert.encoder.layer.0.attention.self.dropout"] == "attention"
    facts = {"num_samples": 8, "objective": "mlm", "text": "some.txt", "seed": 4, "date": "2026-01-01"}
    assert facts.items() <= schedule.profile.items()
    again = DropoutSchedule.from_profile(replace(profile, provenance={}), model)
    assert again.profile["digest"] == schedule.profile["digest"]
    name = next(iter(profile.tensor_means))
    other = DropoutSchedule.from_profile(profile_of(model, **{name: 1.5}), model)
    assert other.profile["digest"] != schedule.profile["digest"]


def test_rates_given_one_by_one(tmp_path: Path) -> None:
    model, classifier = language_model("bert"), classifier_of("bert")
    paths = list(DropoutSchedule.uniform(model, 0.1).rates)
    rates = {path: k / 10 for k, path in enumerate(paths)}
    schedule = DropoutSchedule.from_rates(dict(reversed(rates.items())), model)
    assert list(schedule.rates.items()) == list(rates.items())
    assert (schedule.shape, schedule.upper, schedule.lower) == ("table", 0.6, 0.0)
    relative = {path.removeprefix("bert."): rate for path, rate in rates.items()}
    assert DropoutSchedule.from_rates(relative, model) == schedule
    assert DropoutSchedule.from_rates({**relative, "dropout": 0.9}, classifier).rates["dropout"] == 0.9

    table = tmp_path / "rates.json"
    table.write_text(json.dumps(rates))
    assert DropoutSchedule.from_rates(table, model) == schedule
    table = tmp_path / "rates.csv"
    table.write_text("path, rate\n" + "".join(f"{path}, {rate}\n" for path, rate in relative.items()) + "\n")
    assert DropoutSchedule.from_rates(table, model) == schedule
    table.write_text("".join(f"{path},{rate}\n" for path, rate in rates.items()))
    assert DropoutSchedule.from_rates(str(table), model) == schedule


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bert.embeddings.dropout": None}, "no rate for the dropout site bert.embeddings.dropout"),
        ({"embeddings.dropout": 0.1}, "two rates for the dropout site bert.embeddings.dropout"),
        ({"embeddings.dropuot": 0.1}, r"'embeddings.dropuot' is no .*\(did you mean 'embeddings.dropout'\?\)"),
        ({"bert.embeddings.dropout": 1.0}, "embeddings.dropout is 1.0; expected a number"),
        ({"bert.embeddings.dropout": "high"}, "embeddings.dropout is 'high'; expected a number"),
    ],
)
def test_rates_that_do_not_fit_the_model_are_refused(changes: dict[str, object], message: str) -> None:
    model = language_model("bert")
    rates = {**DropoutSchedule.uniform(model, 0.1).rates, **changes}
    with pytest.raises(ScheduleError, match=message):
        DropoutSchedule.from_rates({path: rate for path, rate in rates.items() if rate is not None}, model)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rates.yaml", "", "neither .json nor .csv"),
        ("rates.json", "{", "not valid JSON"),
        ("rates.json", "[1]", "holds no object"),
        ("rates.json", "{}", "gives no rates"),
        ("rates.json", '{"a": 0.1, "a": 0.2}', "gives a twice"),
        ("rates.json", '{"a": {"rate": 0.1}}', "gives a an object; expected a number"),
        ("rates.json", '{"kind": "dropout-schedule"}', "holds 'dropout-schedule'; expected a plain object"),
        ("rates.csv", "", "gives no rates"),
        ("rates.csv", "a,0.1\nb,much\n", "rates.csv:2: found 'b,much'"),
        ("rates.csv", "a,0.1,0.2\n", "rates.csv:1: found 'a,0.1,0.2'"),
        ("rates.csv", "a\n", "rates.csv:1: found 'a'"),
        *(
            ("rates.csv", f"{line}\nb,0.1\n", f"rates.csv:1: found '{line}'; expected a path, .* or headings such as")
            for line in ("encoder.dropout,O.1", "encoder.dropout,none", "dropout,O.1", "dropout,")
        ),
        ("rates.csv", "a,nan\n", "of a is nan"),
        ("rates.csv", "a,0.1\na,0.2\n", "gives a twice"),
    ],
)
def test_a_malformed_table_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises((ArtefactError, ScheduleError), match=message):
        DropoutSchedule.from_rates(tmp_path / name, language_model("bert"))
    with pytest.raises(ArtefactError, match=r"neither|cannot read .*No such file"):
        DropoutSchedule.from_rates(tmp_path / "nowhere.csv", language_model("bert"))


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    model = classifier_of("t5")
    for schedule in (
        DropoutSchedule.from_profile(profile_of(language_model("t5")), model, include_head=True),
        DropoutSchedule.from_profile(profile_of(model), model, shape="step", aggregate="sum", grouping="dataflow"),
        DropoutSchedule.uniform(model, 0.1),
        controls.shuffled(DropoutSchedule.from_profile(profile_of(model), model), seed=2),
    ):
        path = schedule.save(tmp_path / "new" / "schedule.json")
        loaded = DropoutSchedule.load(path)
        assert loaded == schedule
        assert list(loaded.rates) == list(schedule.rates)
        assert loaded.digest == schedule.digest


def test_a_file_of_schema_1_still_loads(tmp_path: Path) -> None:
    facts = {
        "kind": "dropout-schedule",
        "schema": 1,
        "shape": "linear",
        "grouping": "dataflow",
        "upper": 0.1,
        "lower": 0.0,
        "mean_rate": 0.05,
        "rates": {"bert.embeddings.dropout": 0.0, "bert.encoder.layer.0.output.dropout": 0.1},
        "scores": {"bert.embeddings.dropout": 0.016, "bert.encoder.layer.0.output.dropout": 0.0001},
        "profile": {"objective": "mlm", "reduction": "mean", "num_samples": 256},
        "model": {"model_type": "bert", "backbone_prefix": "bert.", "shapes": {"embeddings.LayerNorm.bias": [16]}},
    }
    (tmp_path / "old.json").write_text(json.dumps(facts))
    schedule = DropoutSchedule.load(tmp_path / "old.json")
    names = ("shape", "grouping", "upper", "lower", "mean_rate", "rates", "scores", "profile", "model")
    assert {name: getattr(schedule, name) for name in names} == {name: facts[name] for name in names}
    assert (schedule.aggregate, schedule.kinds, schedule.derived_from) == ("tensor_mean", {}, {})
    assert DropoutSchedule.load(schedule.save(tmp_path / "new.json")) == schedule


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = DropoutSchedule.uniform(language_model("llama"), 0.1).save(tmp_path / "schedule.json")
    whole = json.loads(path.read_text())

    def load(**changes: object) -> None:
        path.write_text(json.dumps({k: v for k, v in {**whole, **changes}.items() if v is not None}))
        DropoutSchedule.load(path)

    with pytest.raises(ArtefactError, match="has no 'model'"):
        load(model=None)
    with pytest.raises(ArtefactError, match="schema version 3; this version of guided-dropout reads 2 and 1: make"):
        load(schema=3)
    with pytest.raises(ArtefactError, match="expected 'dropout-schedule'"):
        load(kind="fisher-profile")
    with pytest.raises(ScheduleError, match=r"self_attn.attention_dropout is 1.5"):
        load(sites={path: {**site, "rate": 1.5} for path, site in whole["sites"].items()})
    with pytest.raises(ScheduleError, match="without sites"):
        load(sites={})
    with pytest.raises(ArtefactError, match="has no 'score'"):
        load(sites={"a": {"rate": 0.1}})
    with pytest.raises(ArtefactError, match="is damaged"):
        load(sites=["a"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "is damaged .model is None, not dict"),
        ({"model": {}}, "has no 'model_type'"),
        ({"model": {"model_type": "llama", "backbone_prefix": None, "shapes": {}}}, "backbone_prefix is None, not str"),
        ({"model": {"model_type": "llama", "backbone_prefix": "model."}}, "has no 'shapes'"),
        ({"model": {"model_type": "llama", "backbone_prefix": "model.", "shapes": []}}, "shapes is a list, not dict"),
        ({"model": {"model_type": "a", "backbone_prefix": "", "shapes": {"w": 3}}}, "shape of w is a int, not list"),
        ({"model": {"model_type": "a", "backbone_prefix": "", "shapes": {"w": ["3"]}}}, "side of w is a str, not int"),
        ({"sites": {"a": {"rate": 0.1, "score": "high", "kind": "module"}}}, "score of a is a str, not int or float"),
        ({"sites": {"a": {"rate": 0.1, "score": None, "kind": 3}}}, "kind of a is a int, not str"),
        ({"profile": None}, "profile is None, not dict"),
        ({"profile": {"x": 1}}, "has no 'num_samples'"),
        ({"profile": {"num_samples": "many", "objective": "mlm"}}, "num_samples is a str, not int"),
        ({"profile": {"num_samples": 8, "objective": "mlm", "date": 2026}}, "date is a int, not str or null"),
        ({"derived_from": {"digest": "0123"}}, "has no 'shape'"),
        ({"schema": 1, "rates": ["a"], "scores": {}}, "rates is a list, not dict"),
        ({"derived_from": []}, "derived_from is a list, not dict"),
        ({"upper": None}, "upper is None, not int or float"),
        ({"grouping": None}, "grouping is None, not str"),
    ],
)
def test_what_would_fail_only_where_it_is_used_is_refused_when_loaded(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    path = DropoutSchedule.uniform(language_model("llama"), 0.1).save(tmp_path / "schedule.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ArtefactError, match=rf"schedule.json .*{message}.*expected a whole dropout-schedule file"):
        DropoutSchedule.load(path)


def test_a_path_for_a_profile_is_refused():
    with pytest.raises(
        ArtefactError, match=r"expected a FisherProfile: give FisherProfile.from_pretrained\('build/p'\)"
    ):
        DropoutSchedule.from_profile("build/p", language_model("bert"))
