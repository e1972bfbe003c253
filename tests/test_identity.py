"""The digest of weights: the same for the same model, another for another."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families import classifier_of, language_model, measured_on, profile_of
from torch import nn

from guided_dropout import apply_dropout, estimate_fisher, find_sites
from guided_dropout.errors import ModelError, ScheduleError
from guided_dropout.identity import model_identity, weights_digest, weights_identity
from guided_dropout.regularizers import L2SP, Context, GaussianDropout
from guided_dropout.schedule import DropoutSchedule


def digest_of(model: torch.nn.Module) -> str:
    return weights_digest(dict(model.named_parameters()))


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_the_digest_is_the_models_whatever_its_precision_and_the_order_of_its_parameters(family: str) -> None:
    digest = digest_of(language_model(family))
    assert len(digest) == 16
    assert digest_of(language_model(family)) == digest
    assert digest_of(language_model(family).double()) == digest
    assert digest_of(language_model(family).bfloat16()) == digest
    backwards = dict(reversed(list(language_model(family).named_parameters())))
    assert weights_digest(backwards) == digest
    assert digest_of(language_model(family, seed=1)) != digest


def test_of_weights_in_float16_it_cannot_be_told_whose_they_are() -> None:
    """Rounded twice, to float16 and then to bfloat16, a number may be another than rounded once."""
    model, half = language_model("bert"), language_model("bert").half()
    assert weights_digest(dict(half.named_parameters())) is None
    profile = profile_of(model)
    assert profile.has_weights_of(half) is None
    assert replace(profile, model=model_identity(half)).has_weights_of(model) is None
    schedule = DropoutSchedule.from_profile(profile, model)
    assert schedule.has_weights_of(half) is None
    assert DropoutSchedule.from_profile(profile, half).has_weights_of(model) is None
    assert weights_identity(half, [name for name, _ in half.named_parameters()]) == {}


def test_a_step_of_training_changes_the_digest_and_so_do_a_name_and_a_shape() -> None:
    model = language_model("bert")
    before = digest_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    ids = torch.arange(3, 19).reshape(2, 8)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert digest_of(model) != before
    flat = torch.arange(6.0)
    digests = {weights_digest({"a": flat}), weights_digest({"b": flat}), weights_digest({"a": flat.reshape(2, 3)})}
    assert len(digests) == 3


def test_any_tensor_has_a_digest() -> None:
    tensors = {
        "scalar": torch.tensor(1.0),
        "empty": torch.empty(0, 3),
        "whole": torch.arange(5),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "large": torch.arange(100_000.0),
    }
    digest = weights_digest(tensors)
    assert weights_digest({name: t.clone() for name, t in tensors.items()}) == digest
    for name in ("scalar", "whole", "transposed"):
        assert weights_digest({**tensors, name: tensors[name] + 1}) != digest


def test_a_schedule_knows_the_weights_that_it_was_made_on_under_any_head() -> None:
    model, classifier = language_model("bert"), classifier_of("bert")
    schedule = DropoutSchedule.uniform(model, 0.1)
    assert schedule.has_weights_of(model) is True
    assert schedule.has_weights_of(classifier) is False
    classifier.bert.load_state_dict(model.bert.state_dict(), strict=False)
    assert schedule.has_weights_of(classifier) is True
    with torch.no_grad():
        classifier.classifier.weight += 1
        classifier.bert.pooler.dense.weight += 1  # which feeds no site of the backbone
    assert schedule.has_weights_of(classifier) is True
    with torch.no_grad():
        classifier.bert.encoder.layer[1].output.dense.weight *= 1.1
    assert schedule.has_weights_of(classifier) is False


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_a_profile_knows_the_weights_that_it_was_measured_on_under_any_head(family: str) -> None:
    """T5's language model is its own backbone, so that its output layer has no prefix to be known by."""
    model, classifier = language_model(family), classifier_of(family)
    if family == "t5":
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # not tied, as in T5 1.1
    profile = measured_on(model)
    assert profile.has_weights_of(model) is True
    assert profile.weights_note(model) is None
    assert profile.has_weights_of(classifier) is False
    here, there = (getattr(m, m.base_model_prefix, m) for m in (model, classifier))
    lacking = there.load_state_dict(
        {k: v for k, v in here.state_dict().items() if k in there.state_dict()}, strict=False
    )
    assert all("pooler" in name for name in lacking.missing_keys)
    assert profile.has_weights_of(classifier) is True
    assert profile.weights_note(classifier) is None
    assert measured_on(classifier).has_weights_of(model) is (None if family == "bert" else True)  # BERT's pooler
    with torch.no_grad():
        next(p for p in there.parameters() if p.dim() == 2).add_(0.5)
    assert profile.has_weights_of(classifier) is False
    assert profile.weights_note(classifier) == (
        f"note: the profile was measured on other weights ({profile.title}) than those of {type(classifier).__name__}"
    )


def test_a_profile_of_an_earlier_version_knows_its_own_model_alone_or_nothing() -> None:
    model, classifier = language_model("bert"), classifier_of("bert")
    profile = measured_on(model)
    without = {key: value for key, value in profile.model.items() if key != "backbone"}
    assert replace(profile, model=without).has_weights_of(model) is True
    assert replace(profile, model=without).has_weights_of(classifier) is None
    assert profile_of(model).has_weights_of(model) is None
    assert profile_of(model).weights_note(model) is None


def test_a_schedule_of_an_earlier_version_does_not_say() -> None:
    model = language_model("bert")
    schedule = DropoutSchedule.uniform(model, 0.1)
    facts = {key: value for key, value in schedule.model.items() if key != "digest"}
    old = DropoutSchedule(**{**vars(schedule), "model": facts})
    assert old.has_weights_of(model) is None


@pytest.mark.parametrize("scored", [False, True])
def test_of_another_model_a_schedule_does_not_say_that_its_rates_hold(scored: bool) -> None:
    model = language_model("bert")
    schedule = DropoutSchedule.uniform(model, 0.1)
    facts = {**schedule.profile, "other_weights": True} if scored else {}
    schedule = replace(schedule, model={**schedule.model, "digest": "of others"}, profile=facts)
    assert "its rates hold all the same" in (schedule.weights_note(model) or "")
    for other in (language_model("roberta"), language_model("bert", intermediate_size=20)):
        assert schedule.weights_note(other) is None
        with pytest.raises(ScheduleError, match="a schedule for another model"):
            apply_dropout(other, schedule)


@pytest.mark.parametrize(
    ("wrap", "inside"), [(nn.DataParallel, "module"), (lambda m: torch.compile(m, backend="eager"), "_orig_mod")]
)
def test_what_is_wrapped_around_a_model_is_not_taken_for_it(wrap, inside: str) -> None:
    """All of it would be a head without noise, or a backbone without a head, and nothing would say so."""
    model = classifier_of("bert")
    wrapped, inputs = wrap(model), {"input_ids": torch.arange(3, 19).reshape(2, 8)}
    schedule = DropoutSchedule.from_profile(profile_of(model), model)
    for use in (
        lambda: find_sites(wrapped, inputs),
        lambda: apply_dropout(wrapped, schedule, inputs),
        lambda: DropoutSchedule.uniform(wrapped, 0.1),
        lambda: GaussianDropout().apply(wrapped, Context(inputs=inputs)),
        lambda: L2SP().apply(wrapped, Context()),
        lambda: estimate_fisher(wrapped, [{"input_ids": [5, 6], "labels": 1}]),
    ):
        with pytest.raises(ModelError, match=rf"{type(wrapped).__name__} is wrapped.*give model\.{inside}"):
            use()
