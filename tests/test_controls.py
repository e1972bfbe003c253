from __future__ import annotations

import math

import pytest
from families import FAMILIES, classifier_of, language_model, profile_of
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from random_profiles import random_profile
from test_sites_families import build

from guided_dropout.errors import ScheduleError
from guided_dropout.schedule import DropoutSchedule, controls
from guided_dropout.sites import find_sites


def every_control(schedule: DropoutSchedule, model: object) -> dict[str, DropoutSchedule]:
    return {
        "uniform": controls.uniform(schedule),
        "top_only": controls.top_only(schedule, k=2),
        "role_mean": controls.role_mean(schedule),
        "reversed": controls.reversed(schedule),
        "shuffled": controls.shuffled(schedule, seed=5),
        "depth_linear": controls.depth_linear(schedule),
        "magnitude": controls.magnitude(schedule, model),
    }


@pytest.mark.parametrize("shape", ["linear", "exponential:3"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_control_has_the_same_sites_and_mean_and_says_what_it_is(family: str, shape: str) -> None:
    model = language_model(family)
    schedule = DropoutSchedule.from_profile(random_profile(model), model, shape=shape)
    made = every_control(schedule, model)
    assert tuple(made) == controls.CONTROLS
    for name, control in made.items():
        assert list(control.rates) == list(schedule.rates)
        assert control.mean_rate == pytest.approx(schedule.mean_rate, rel=1e-12)
        assert control.shape == name
        assert control.derived_from["digest"] == schedule.digest
        assert control.derived_from["shape"] == shape
        assert (control.model, control.kinds) == (schedule.model, schedule.kinds)


def test_top_only_keeps_the_sites_of_the_highest_scores_and_levels_the_others() -> None:
    model = language_model("bert")
    schedule = DropoutSchedule.from_profile(random_profile(model), model)
    by_score = sorted(schedule.rates, key=lambda path: -schedule.scores[path])
    for k in (1, 3):
        kept, levelled = by_score[:k], by_score[k:]
        control = controls.top_only(schedule, k)
        assert [control.rates[path] for path in kept] == [schedule.rates[path] for path in kept]
        mean = sum(schedule.rates[path] for path in levelled) / len(levelled)
        assert [control.rates[path] for path in levelled] == pytest.approx([mean] * len(levelled))
        assert control.derived_from["k"] == k
    assert controls.top_only(schedule, len(by_score)).rates == schedule.rates
    with pytest.raises(ScheduleError, match="k 0 of the control top-only; expected at least 1"):
        controls.top_only(schedule, 0)


def test_top_only_goes_by_the_rates_where_there_are_no_scores() -> None:
    model = language_model("bert")
    paths = [site.path for site in find_sites(model)]
    table = DropoutSchedule.from_rates({path: (k + 2) % 7 / 10 for k, path in enumerate(paths)}, model)
    rates = controls.top_only(table).rates
    assert list(rates.values()) == pytest.approx([*[2.1 / 6] * 5, 0, 2.1 / 6])


def test_sites_without_a_score_keep_their_rates_under_depth_linear() -> None:
    model = classifier_of("bert")
    schedule = DropoutSchedule.from_profile(random_profile(language_model("bert")), model, include_head=True)
    (head,) = [path for path, score in schedule.scores.items() if score is None]
    control = controls.depth_linear(schedule)
    assert control.rates[head] == schedule.rates[head]
    backbone = [path for path in schedule.rates if path != head]
    assert sum(control.rates[p] for p in backbone) == pytest.approx(sum(schedule.rates[p] for p in backbone))
    rising = [control.rates[path] for path in backbone]
    assert rising == sorted(rising)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_magnitude_takes_a_model_with_adapters_that_came_later() -> None:
    plain = language_model("bert")
    schedule = DropoutSchedule.from_profile(random_profile(plain), plain)
    expected = controls.magnitude(schedule, plain)
    adapted = get_peft_model(plain, LoraConfig(target_modules=["query"], lora_dropout=0.1))
    assert controls.magnitude(schedule, adapted).rates == expected.rates


def test_role_mean_gives_the_same_place_in_each_layer_the_mean_of_its_rates() -> None:
    model = language_model("bert")
    paths = [site.path for site in find_sites(model)]
    table = DropoutSchedule.from_rates({path: k / 10 for k, path in enumerate(paths)}, model)
    attention, output, last = (0.1 + 0.4) / 2, (0.2 + 0.5) / 2, (0.3 + 0.6) / 2
    assert list(controls.role_mean(table).rates.values()) == pytest.approx([0, *[attention, output, last] * 2])


ALBERT = "albert.encoder.albert_layer_groups.{}.albert_layers.0.attention.{}_dropout[{}]"


@pytest.mark.parametrize("groups", [1, 2])
def test_role_mean_takes_the_calls_of_a_layer_that_is_used_again_for_layers(groups: int) -> None:
    model = language_model("albert", num_hidden_layers=4, num_hidden_groups=groups)
    sites = find_sites(model, per_call=True)
    schedule = DropoutSchedule.from_rates({site.path: k / 10 for k, site in enumerate(sites)}, model)
    control = controls.role_mean(schedule)
    for what in ("attention", "output"):
        paths = [ALBERT.format(g, what, k) for g in range(groups) for k in range(4 // groups)]
        mean = math.fsum(schedule.rates[path] for path in paths) / 4
        assert [control.rates[path] for path in paths] == pytest.approx([mean] * 4)
    assert control.mean_rate == pytest.approx(schedule.mean_rate)


def test_role_mean_keeps_places_apart_where_a_layer_uses_one_knob_for_several() -> None:
    for family, knob in (("vit", "vit.layers.{}.dropout"), ("xlnet", "transformer.layer.{}.rel_attn.dropout")):
        model = build(family)
        paths = [site.path for site in find_sites(model, per_call=True)]
        table = DropoutSchedule.from_rates({path: k / 100 for k, path in enumerate(paths)}, model)
        rates = controls.role_mean(table).rates
        for k in (0, 1):
            layers = [f"{knob.format(layer)}[{k}]" for layer in (0, 1)]
            mean = sum(table.rates[path] for path in layers) / 2
            assert [rates[path] for path in layers] == pytest.approx([mean] * 2)


def test_reversed_gives_the_least_informative_site_the_lowest_rate() -> None:
    model = language_model("bert")
    schedule = DropoutSchedule.from_profile(random_profile(model), model, shape="step:3")
    control = controls.reversed(schedule)
    up = sorted(schedule.scores, key=schedule.scores.__getitem__)
    assert [control.rates[p] for p in up] == [schedule.rates[p] for p in reversed(up)]
    assert controls.reversed(control).rates != schedule.rates or control.scores == schedule.scores
    table = DropoutSchedule.from_rates({p: k / 10 for k, p in enumerate(schedule.rates)}, model)
    assert list(controls.reversed(table).rates.values()) == list(table.rates.values())[::-1]


def test_shuffled_is_a_permutation_that_its_seed_decides() -> None:
    model = language_model("bert")
    schedule = DropoutSchedule.from_profile(random_profile(model), model)
    drawn = [controls.shuffled(schedule, seed) for seed in range(20)]
    assert all(sorted(s.rates.values()) == sorted(schedule.rates.values()) for s in drawn)
    assert len({tuple(s.rates.values()) for s in drawn}) == 20
    assert controls.shuffled(schedule, 3) == drawn[3]
    assert drawn[3].derived_from["seed"] == 3


def test_depth_linear_rises_with_the_order_of_the_calls() -> None:
    model = language_model("bert")
    schedule = DropoutSchedule.from_profile(random_profile(model), model, upper=0.3, lower=0.1)
    control = controls.depth_linear(schedule)
    paths = [site.path for site in find_sites(model)]
    assert [control.rates[p] for p in paths] == pytest.approx([0.1 + 0.2 * k / 6 for k in range(7)])
    assert set(control.scores.values()) == {None}
    assert not control.profile


def test_magnitude_gives_the_site_with_the_largest_weights_the_lowest_rate() -> None:
    model, classifier = language_model("bert"), classifier_of("bert")
    classifier.bert.load_state_dict(model.bert.state_dict(), strict=False)
    schedule = DropoutSchedule.from_profile(random_profile(model), model)
    control = controls.magnitude(schedule, model)
    squares = {n: float(p.detach().double().square().mean()) for n, p in model.named_parameters()}
    sizes = {s.path: math.fsum(squares[n] for n in s.parameters) / len(s.parameters) for s in find_sites(model)}
    assert control.scores == pytest.approx(sizes)
    up = sorted(sizes, key=sizes.__getitem__)
    assert [control.rates[p] for p in up] == sorted(schedule.rates.values(), reverse=True)
    assert controls.magnitude(schedule, classifier).rates == control.rates
    for other in (language_model("roberta"), language_model("bert", num_hidden_layers=3)):
        with pytest.raises(ScheduleError, match=r"has other dropout sites than the schedule.*expected a model with"):
            controls.magnitude(schedule, other)


def test_a_new_head_keeps_its_rate() -> None:
    classifier = classifier_of("bert")
    schedule = DropoutSchedule.from_profile(
        profile_of(language_model("bert")), classifier, upper=0.3, include_head=True
    )
    for name in ("reversed", "shuffled", "magnitude"):
        assert every_control(schedule, classifier)[name].rates["dropout"] == 0.3


def test_a_schedule_of_one_rate_stays_as_it_is() -> None:
    model = language_model("gpt2")
    flat = DropoutSchedule.uniform(model, 0.2)
    for control in every_control(flat, model).values():
        assert list(control.rates.values()) == pytest.approx([0.2] * len(flat.rates))


@given(n=st.integers(1, 40), rate=st.sampled_from([0.1, 0.05, 0.2, 0.0495]) | st.floats(0, 0.99))
def test_each_control_of_one_rate_is_refused_as_the_schedule_itself(n: int, rate: float) -> None:
    model = {"model_type": "bert", "backbone_prefix": "", "shapes": {}}
    rates = {f"layer.{i}.dropout": rate for i in range(n)}
    flat = DropoutSchedule(rates, dict.fromkeys(rates), "table", "owner", upper=rate, lower=rate, model=model)
    for name in set(controls.CONTROLS) - {"magnitude"}:
        control = getattr(controls, name)(flat)
        with pytest.raises(ScheduleError, match="is the schedule itself"):
            controls.check_apart(name, control, flat)
