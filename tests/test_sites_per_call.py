"""A rate for each call of a knob that is used several times in a forward."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from accelerate import Accelerator
from families import classifier_of, language_model, profile_of
from test_sites_families import build, state_of

from guided_dropout import DropoutSchedule, apply_dropout, find_sites
from guided_dropout.errors import SiteError
from guided_dropout.probe import observe
from guided_dropout.schedule import controls
from guided_dropout.sites import trace

SEVERAL = ["t5", "mt5", "albert", "xlnet", "vit"]
IDS = {"input_ids": torch.arange(3, 19).reshape(2, 8)}


@pytest.mark.parametrize("family", SEVERAL)
def test_each_call_is_a_site_and_receives_its_rate(family: str) -> None:
    model = build(family)
    before = state_of(model)
    sites = find_sites(model, per_call=True)
    assert [site.path for site in sites] == list(trace(model, per_call=True).calls)
    assert all(site.calls == 1 and site.parameters for site in sites)
    rates = {site.path: 0.01 * (i + 1) for i, site in enumerate(sites)}
    schedule = DropoutSchedule.from_rates(rates, model)
    assert schedule.per_call
    with apply_dropout(model, schedule) as handle:
        assert handle.rates == rates
        for _ in range(2):
            assert [call.rate for call in observe(model, rates={})] == list(rates.values())
        assert len(find_sites(model)) < len(sites)
        with torch.no_grad():
            model.train()
            assert len(find_sites(model, per_call=True)) == len(sites)
            model.eval()
    assert state_of(model) == before


def test_each_call_is_fed_by_what_came_before_it() -> None:
    sites = {site.path: site for site in find_sites(language_model("t5"), per_call=True)}
    assert sites["encoder.dropout[0]"].parameters == ("shared.weight",)
    assert sites["encoder.dropout[1]"].parameters == ("encoder.final_layer_norm.weight",)
    schedule = DropoutSchedule.from_profile(
        profile_of(language_model("t5")), language_model("t5"), upper=0.4, lower=0.1, per_call=True
    )
    assert schedule.rates["encoder.dropout[0]"] > schedule.rates["encoder.dropout[1]"]
    assert "encoder.dropout" not in schedule.rates
    assert controls.magnitude(schedule, language_model("t5")).rates.keys() == schedule.rates.keys()


def test_training_drops_at_the_rates_of_the_calls() -> None:
    """Against the model's own dropout modules, called by a hand that turns them."""
    model, by_hand = language_model("albert").train(), language_model("albert").train()
    rates = {site.path: 0.05 * (i + 1) for i, site in enumerate(find_sites(model, per_call=True))}
    modules = dict(by_hand.named_modules())
    attention = by_hand.albert.encoder.albert_layer_groups[0].albert_layers[0].attention
    for knob in {path.split("[")[0] for path in rates}:
        its = [rate for path, rate in rates.items() if path.split("[")[0] == knob]
        turns = iter(its)
        called = attention if knob.endswith("attention_dropout") else modules[knob]
        called.register_forward_pre_hook(lambda *_, at=modules[knob], turns=turns: setattr(at, "p", next(turns)))
    with apply_dropout(model, DropoutSchedule.from_rates(rates, model)):
        torch.manual_seed(0)
        found = model(**IDS).logits
    torch.manual_seed(0)
    assert torch.equal(found, by_hand(**IDS).logits)


def test_a_schedule_by_call_of_the_language_model_serves_the_classifier() -> None:
    base, model = language_model("albert"), classifier_of("albert")
    schedule = DropoutSchedule.from_profile(profile_of(base), base, upper=0.4, lower=0.1, per_call=True)
    with apply_dropout(model, schedule) as handle:
        assert list(handle.rates.values()) == list(schedule.rates.values())


@pytest.mark.parametrize("rate", [0.35, 0.2, 0.4])  # the latter two are also rates of calls below
def test_a_plain_schedule_on_top_rules(rate: float) -> None:
    model = language_model("albert")
    before = state_of(model)
    rates = {site.path: (i + 1) / 10 for i, site in enumerate(find_sites(model, per_call=True))}
    lower = apply_dropout(model, DropoutSchedule.from_rates(rates, model))
    upper = apply_dropout(model, DropoutSchedule.uniform(model, rate))
    assert {call.rate for call in observe(model, rates={})} == {rate}
    lower.remove()
    assert {call.rate for call in observe(model, rates={})} == {rate}
    upper.remove()
    assert state_of(model) == before


def test_a_copy_of_a_model_keeps_the_rates_of_its_calls() -> None:
    model = language_model("albert")
    rates = {site.path: (i + 1) / 10 for i, site in enumerate(find_sites(model, per_call=True))}
    with apply_dropout(model, DropoutSchedule.from_rates(rates, model)):
        best = copy.deepcopy(model)
    assert [call.rate for call in observe(best, rates={})] == list(rates.values())
    with apply_dropout(best, DropoutSchedule.uniform(best, 0.2)):
        assert {call.rate for call in observe(best, rates={})} == {0.2}
    assert [call.rate for call in observe(best, rates={})] == list(rates.values())


def test_a_pickled_model_keeps_them_too() -> None:
    model = language_model("albert")
    rates = {site.path: (i + 1) / 10 for i, site in enumerate(find_sites(model, per_call=True))}
    with apply_dropout(model, DropoutSchedule.from_rates(rates, model)):
        saved = pickle.dumps(model)
    assert [call.rate for call in observe(pickle.loads(saved), rates={})] == list(rates.values())


@pytest.mark.parametrize("family", ["opt", "bart", "pegasus"])
def test_calls_within_one_forward_of_a_module_cannot_be_told_apart(family: str) -> None:
    with pytest.raises(SiteError, match=r"layers.0.dropout is used in [23] dropout calls and 1 forwards"):
        find_sites(language_model(family), per_call=True)


def test_the_rate_of_a_call_that_an_error_ended_is_not_taken_for_somebody_elses() -> None:
    model = language_model("albert")
    before = {site.path: site.rate for site in find_sites(model)}
    schedule = DropoutSchedule.from_profile(profile_of(model), model, upper=0.4, lower=0.05, per_call=True)
    calls = 0

    def fail(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise ZeroDivisionError

    layer = next(m for m in model.modules() if type(m).__name__ == "AlbertLayer")
    with apply_dropout(model, schedule), layer.register_forward_hook(fail), pytest.raises(ZeroDivisionError):
        model.train()(input_ids=torch.tensor([[5, 6, 7]]))
    assert calls == 2
    assert {site.path: site.rate for site in find_sites(model)} == before


def test_gradient_checkpointing_is_refused_before_and_after() -> None:
    model = language_model("t5").train()
    schedule = DropoutSchedule.from_profile(profile_of(model), model, per_call=True)
    model.activation_checkpointing_enable({"use_reentrant": False})
    before = state_of(model)
    with pytest.raises(SiteError, match="gradient checkpointing"):
        apply_dropout(model, schedule)
    assert state_of(model) == before


def test_more_calls_than_rates_is_an_error() -> None:
    model = language_model("albert").train()
    site = next(site for site in find_sites(model, per_call=True) if site.path.endswith("output_dropout[1]"))
    module = model.get_submodule(site.path[:-3])
    with apply_dropout(model, DropoutSchedule.from_profile(profile_of(model), model, per_call=True)):
        model(**IDS)
        with pytest.raises(SiteError, match="was called more times in a forward, expected 2"):
            module(torch.ones(3))


def test_torch_compile_is_refused() -> None:
    model = language_model("albert").train()
    with apply_dropout(model, DropoutSchedule.from_profile(profile_of(model), model, per_call=True)):
        torch._dynamo.reset()
        compiled = torch.compile(lambda ids: model(input_ids=ids).logits, backend="eager", fullgraph=True)
        with pytest.raises(Exception, match=r"torch\.compile"):
            compiled(IDS["input_ids"])
        torch._dynamo.reset()


def albert_by_call():
    """An ALBERT of which nothing is compiled, and rates of which those of the second calls are high."""
    torch._dynamo.reset()
    model = language_model("albert").train()
    rates = {site.path: 0.8 if site.path.endswith("[1]") else 0.1 for site in find_sites(model, per_call=True)}
    return model, DropoutSchedule.from_rates(rates, model)


@pytest.mark.filterwarnings("ignore")
def test_what_was_compiled_before_is_left_for_the_plain_forward_with_the_rates_of_the_calls() -> None:
    model, schedule = albert_by_call()
    compiled = torch.compile(model, backend="eager")
    with apply_dropout(model, DropoutSchedule.uniform(model, 0.1)):
        compiled(**IDS)
    whole = torch.compile(model, backend="eager", fullgraph=True)
    with apply_dropout(model, schedule), pytest.raises(Exception, match=r"torch\.compile"):
        whole(**IDS)
    for _ in range(2):
        with apply_dropout(model, schedule):
            for seed in range(3):
                logits = []
                for forward in (model, compiled):
                    torch.manual_seed(seed)
                    logits.append(forward(**IDS).logits)
                assert torch.equal(*logits)
        compiled(**IDS)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
def test_nothing_that_was_compiled_under_a_plain_schedule_on_top_stays() -> None:
    model, schedule = albert_by_call()
    compiled, logits = torch.compile(model, backend="eager"), []
    with apply_dropout(model, schedule):
        with apply_dropout(model, DropoutSchedule.uniform(model, 0.1)):
            compiled(**IDS)
        for forward in (model, compiled):
            torch.manual_seed(0)
            logits.append(forward(**IDS).logits)
    assert torch.equal(*logits)
    torch._dynamo.reset()


def test_a_model_that_accelerate_prepared_under_it_runs_once_unwrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.state.AcceleratorState._shared_state", {})  # has one precision in a process
    model, schedule = albert_by_call()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    with apply_dropout(model, schedule):
        prepared = accelerator.prepare(model)
        prepared.train()(**IDS)
    plain = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False).eval()
    assert torch.equal(plain(**IDS).logits, albert_by_call()[0].eval()(**IDS).logits)
