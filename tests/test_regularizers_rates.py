from __future__ import annotations

import gc
import warnings
import weakref
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import torch
from families import FAMILIES, classifier_of, language_model, profile_of
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertModel, PreTrainedModel

from guided_dropout.errors import ArtefactError, GuidedDropoutError, ScheduleError, SiteError
from guided_dropout.regularizers import add_residual_sites, apply_dropout, dropout_table
from guided_dropout.schedule import DropoutSchedule
from guided_dropout.sites import find_sites


def rates_of(model: nn.Module) -> dict[str, float]:
    return {site.path: site.rate for site in find_sites(model)}


def guided(model: nn.Module, **options: float) -> DropoutSchedule:
    return DropoutSchedule.from_profile(profile_of(model), model, **options)


def logits(model: PreTrainedModel) -> torch.Tensor:
    torch.manual_seed(0)
    ids = torch.tensor([[5, 6, 7, 8, 9, 2]])
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_schedule_of_the_language_model_serves_the_classifier(family: str) -> None:
    schedule, model = guided(language_model(family), upper=0.4, lower=0.05), classifier_of(family)
    before = rates_of(model)
    with apply_dropout(model, schedule) as handle:
        now = rates_of(model)
        backbone = [site for site in find_sites(model) if not site.in_head]
        assert [now[site.path] for site in backbone] == list(schedule.rates.values())
        assert handle.rates == {site.path: site.rate for site in backbone}
        assert all(now[path] == before[path] for path in now if path not in handle.rates)
    assert rates_of(model) == before


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_training_really_drops_at_the_new_rates(attn: str) -> None:
    """Against a model built with these rates from the start: same seed, same output."""
    options = {"attn_implementation": attn, "seed": 3}
    model = classifier_of("bert", **options).train()
    other = classifier_of("bert", **options, hidden_dropout_prob=0.35, attention_probs_dropout_prob=0.35).train()
    model.dropout.p = other.dropout.p
    assert not torch.equal(logits(model), logits(other))
    with apply_dropout(model, DropoutSchedule.uniform(model, 0.35)):
        assert torch.equal(logits(model), logits(other))
    assert not torch.equal(logits(model), logits(other))
    with apply_dropout(model, DropoutSchedule.uniform(model, 0.0, include_head=True)):
        assert torch.equal(logits(model), logits(model.eval()))


def test_a_bare_backbone_takes_the_schedule_of_its_language_model_and_gives_its_own() -> None:
    model = language_model("bert")
    with torch.random.fork_rng():
        bare = BertModel(model.config)
    with apply_dropout(bare, guided(model)):
        assert list(rates_of(bare).values()) == list(guided(model).rates.values())
    with apply_dropout(model, guided(bare)) as handle:
        assert next(iter(handle.rates)) == "bert.embeddings.dropout"


def test_rates_come_back_when_the_body_raises_and_modes_and_random_state_stay() -> None:
    model = language_model("opt").train()
    model.model.decoder.layers[0].eval()
    modes = [m.training for m in model.modules()]
    before, state = rates_of(model), torch.get_rng_state()
    with pytest.raises(KeyError), apply_dropout(model, guided(model)):
        raise KeyError
    assert rates_of(model) == before
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_handles_may_be_removed_in_any_order(order: tuple[int, ...]) -> None:
    model = language_model("llama")
    own = rates_of(model)
    rates = [0.3, 0.4, 0.5]
    handles = [apply_dropout(model, DropoutSchedule.uniform(model, rate)) for rate in rates]
    left = [0, 1, 2]
    for index in order:
        handles[index].remove()
        handles[index].remove()
        left.remove(index)
        assert rates_of(model) == (dict.fromkeys(own, rates[left[-1]]) if left else own)
    with apply_dropout(model, guided(model)):
        assert rates_of(model) == guided(model).rates
    assert rates_of(model) == own


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("first", [0, 1])
def test_so_may_those_of_a_model_and_of_what_wraps_it(first: int) -> None:
    inner = language_model("bert")
    outer = get_peft_model(inner, LoraConfig(r=2, target_modules=["query"]))
    own = rates_of(outer)
    handles = [apply_dropout(outer, guided(inner)), apply_dropout(inner, DropoutSchedule.uniform(inner, 0.4))]
    handles[first].remove()
    left = handles[1 - first]
    assert left.rates.items() <= rates_of(left.model).items()
    left.remove()
    assert rates_of(outer) == own


def test_a_rate_that_no_schedule_covers_any_more_is_the_users_again() -> None:
    model = classifier_of("bert")
    with apply_dropout(model, guided(model)):
        apply_dropout(model, DropoutSchedule.uniform(model, 0.3, include_head=True)).remove()
        model.dropout.p = 0.45
        apply_dropout(model, DropoutSchedule.uniform(model, 0.2, include_head=True)).remove()
        assert model.dropout.p == 0.45


def _disable_dropout(model: nn.Module) -> None:
    """As TRL's trainers do when they are built."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


@pytest.mark.parametrize("first", [0, 1])
def test_rates_that_somebody_else_has_changed_are_told_once_the_schedule_is_removed(first: int) -> None:
    model = classifier_of("bert")
    before = rates_of(model) | {"dropout": 0.0}  # the head's, which no schedule covers
    handles = [apply_dropout(model, DropoutSchedule.uniform(model, rate)) for rate in (0.2, 0.3)]
    _disable_dropout(model)
    with pytest.warns(UserWarning, match=r"bert.embeddings.dropout .* rate 0, expected 0\.3.*7 of 7.*disable_dropout"):
        handles[first].remove()
    assert rates_of(model) == before | handles[1 - first].rates
    handles[1 - first].remove()
    assert rates_of(model) == before


def test_the_end_of_a_block_tells_it_too_whatever_ended_it() -> None:
    model = classifier_of("bert")

    def fail() -> None:
        with apply_dropout(model, DropoutSchedule.uniform(model, 0.3)):
            _disable_dropout(model)
            raise ZeroDivisionError

    with pytest.warns(UserWarning, match="build the trainer first"), pytest.raises(ZeroDivisionError):
        fail()


def test_a_site_that_was_taken_out_meanwhile_is_nothing_to_tell() -> None:
    model = language_model("llama")
    sites = add_residual_sites(model)
    handle = apply_dropout(model, DropoutSchedule.uniform(model, 0.3))
    sites.remove()
    handle.remove()


def test_a_handle_that_is_lost_is_told_and_its_rates_stay() -> None:
    model = language_model("llama")
    with apply_dropout(model, DropoutSchedule.uniform(model, 0.3)):
        with pytest.warns(ResourceWarning, match="on LlamaForCausalLM was lost before it was removed; expected"):
            apply_dropout(model, DropoutSchedule.uniform(model, 0.4))
        assert set(rates_of(model).values()) == {0.4}
    assert set(rates_of(model).values()) == {0.4}
    with warnings.catch_warnings(action="error"):
        apply_dropout(model, DropoutSchedule.uniform(model, 0.2)).remove()


def test_a_removed_handle_is_not_used_again() -> None:
    model = language_model("llama")
    handle = apply_dropout(model, DropoutSchedule.uniform(model, 0.3))
    with handle:
        pass
    with pytest.raises(GuidedDropoutError, match=r"DropoutHandle has been removed.*call apply_dropout again"), handle:
        pass


def test_a_schedule_is_taken_from_its_file_and_what_is_none_is_refused(tmp_path: Path) -> None:
    model = language_model("llama")
    schedule = DropoutSchedule.uniform(model, 0.3)
    file = schedule.save(tmp_path / "schedule.json")
    for given in (file, str(file)):
        with apply_dropout(model, given) as handle:
            assert handle.rates == schedule.rates
        assert {row["scheduled_rate"] for row in dropout_table(model, given)} == {0.3}
    for nothing, name in (({"a": 0.1}, "a dict"), (None, "None"), (0.3, "a float")):
        with pytest.raises(ScheduleError, match=f"apply_dropout was given {name} for a schedule; .*from_rates"):
            apply_dropout(model, nothing)
    with pytest.raises(ArtefactError, match=r"dropout_table was given a str .*from_pretrained\('build/profile'\)"):
        dropout_table(model, profile="build/profile")


def test_a_model_and_its_schedules_are_not_kept_alive() -> None:
    model = language_model("llama")
    gone = weakref.ref(model)
    with pytest.warns(ResourceWarning):
        apply_dropout(model, guided(model))
    del model
    gc.collect()
    assert gone() is None


def test_a_schedule_for_another_model_is_refused() -> None:
    model = language_model("bert")
    own, schedule = rates_of(model), guided(model)

    def refused(schedule: DropoutSchedule, message: str, on: nn.Module = model) -> None:
        with pytest.raises(
            ScheduleError, match=f"a schedule for another model: .*{message}.*make a schedule on this model"
        ):
            apply_dropout(on, schedule)

    refused(guided(language_model("roberta")), "model type 'roberta', BertForMaskedLM is 'bert'")
    refused(guided(language_model("bert", hidden_size=24)), r"word_embeddings.weight is \[64, 16\].*\[64, 24\]")
    refused(
        guided(language_model("bert", num_hidden_layers=3)),
        "bert.encoder.layer.2.attention.self.dropout is no dropout site",
    )
    refused(
        schedule, "no rate for bert.encoder.layer.2.attention.self.dropout", language_model("bert", num_hidden_layers=3)
    )
    extra = replace(schedule, rates={**schedule.rates, "bert.embeddings.drop": 0.1})
    refused(extra, "bert.embeddings.drop is no dropout site of BertForMaskedLM")
    refused(DropoutSchedule.uniform(classifier_of("bert"), 0.1, include_head=True), "dropout is no dropout site")
    refused(replace(schedule, model={**schedule.model, "shapes": {"gone": [3]}}), r"gone is missing in .*, \[3\]")
    assert rates_of(model) == own


class Deaf(nn.Dropout):
    """Drops at no more than 0.2, whatever it is told: the probe's tiny rate arrives, a real one does not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x, min(self.p, 0.2), self.training)


def test_a_rate_that_does_not_arrive_is_an_error_and_leaves_the_model_as_it_was() -> None:
    model = language_model("bert")
    model.bert.encoder.layer[1].output.dropout = Deaf(0.1)
    own = rates_of(model)
    message = r"bert.encoder.layer.1.output.dropout receives rate 0.2, expected 0.25"
    with pytest.raises(SiteError, match=message):
        apply_dropout(model, DropoutSchedule.uniform(model, 0.25))
    assert rates_of(model) == own
    with apply_dropout(model, DropoutSchedule.uniform(model, 0.2)):
        assert set(rates_of(model).values()) == {0.2}


def test_layer_drop_does_not_disturb_the_proof() -> None:
    model = language_model("opt", layerdrop=0.9)
    for seed in range(5):
        torch.manual_seed(seed)
        with apply_dropout(model, guided(model)):
            assert model.model.decoder.layerdrop == 0.9


def test_the_table_is_plain_data() -> None:
    model = classifier_of("t5")
    profile = profile_of(language_model("t5"))
    schedule = DropoutSchedule.from_profile(profile, model)
    rows = dropout_table(model, schedule, profile)
    assert [row["path"] for row in rows] == [site.path for site in find_sites(model)]
    first, last = rows[0], rows[-1]
    assert first["parameters"] == ["transformer.shared.weight", "transformer.encoder.final_layer_norm.weight"]
    assert first == {
        **{"path": "transformer.encoder.dropout", "kind": "module", "rate": 0.1, "calls": 2, "in_head": False},
        "parameters": first["parameters"],
        "score": schedule.scores["transformer.encoder.dropout"],
        "scheduled_rate": schedule.rates["transformer.encoder.dropout"],
    }
    assert (last["in_head"], last["score"], last["scheduled_rate"]) == (True, None, None)
    assert {row["score"] for row in dropout_table(model)} == {None}
    by_flow = dropout_table(model, profile=profile, grouping="dataflow")
    assert [row["parameters"] for row in by_flow] == [list(site.dataflow) for site in find_sites(model)]
