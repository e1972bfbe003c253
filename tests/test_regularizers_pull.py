"""Regularizers that pull weights: L2-SP, EWC, guided L2-SP and guided weight decay."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

import pytest
import torch
from families import classifier_of, language_model, profile_of
from torch import Tensor, nn
from transformers import WhisperConfig, WhisperForAudioClassification

from guided_dropout.errors import ArtefactError, GuidedDropoutError, ModelError, ScheduleError
from guided_dropout.fisher import FisherProfile
from guided_dropout.regularizers import EWC, L2SP, Context, GuidedDecay, GuidedL2SP, Handle, Regularizer
from guided_dropout.regularizers.strengths import relative_strengths
from guided_dropout.schedule import DropoutSchedule
from guided_dropout.sites import find_sites

PLAIN = torch.tensor(0.25, dtype=torch.float64)


def double_classifier() -> nn.Module:
    return classifier_of("bert").double().train()


def random_profile(model: nn.Module, seed: int = 1) -> FisherProfile:
    """A different value for each parameter."""
    generator = torch.Generator().manual_seed(seed)
    diagonal = {n: torch.rand(p.shape, generator=generator) for n, p in model.named_parameters()}
    means = {n: f.double().mean().item() for n, f in diagonal.items()}
    return replace(profile_of(model), diagonal=diagonal, tensor_means=means)


def moved(model: nn.Module) -> dict[str, Tensor]:
    """Move all weights as training would; returns where they started."""
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter)
    return start


def gradients(handle: Handle, model: nn.Module) -> tuple[Tensor, dict[str, Tensor | None]]:
    loss = handle.loss(PLAIN, model, {}, None)
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return loss, dict(zip(names, found, strict=True))


def assert_pulls(regularizer: Regularizer, context: Context, wanted: dict[str, float | Tensor], zero: set[str]) -> None:
    """The loss is a sum of w (θ - θ*)² / 2, its gradient w (θ - θ*), with θ* = 0 for those in `zero`."""
    model = double_classifier()
    with regularizer.apply(model, context) as handle:
        loss, none = gradients(handle, model)
        at_start = sum(0.5 * (wanted[n] * p.square()).sum() for n, p in model.named_parameters() if n in zero)
        torch.testing.assert_close(loss, PLAIN + at_start)
        start = moved(model)
        loss, found = gradients(handle, model)
        expected = PLAIN.clone()
        for name, parameter in model.named_parameters():
            if name not in wanted:
                assert found[name] is none[name] is None
                continue
            distance = parameter.detach() - (0 if name in zero else start[name])
            expected += 0.5 * (wanted[name] * distance.square()).sum()
            torch.testing.assert_close(found[name], wanted[name] * distance)
        torch.testing.assert_close(loss.detach(), expected)
    assert handle.loss(PLAIN, model, {}, None) is PLAIN


HEAD = {"classifier.weight", "classifier.bias"}
POOLER = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
NAMES = [n for n, _ in classifier_of("bert").named_parameters()]


@pytest.mark.parametrize("new", [None, HEAD | POOLER], ids=["head", "head and pooler"])
def test_l2_sp_pulls_the_pretrained_to_their_start_and_the_new_to_0(new: set[str] | None) -> None:
    zero = new or HEAD
    wanted = {n: 0.3 if n in zero else 0.7 for n in NAMES}
    assert_pulls(L2SP(alpha=0.7, beta=0.3), Context(new=new), wanted, zero)


def test_ewc_pulls_by_the_fisher_information_and_leaves_the_new_alone() -> None:
    profile = random_profile(language_model("bert"))
    wanted = {n: 40 * profile.diagonal[n].double() for n in NAMES if n not in HEAD | POOLER}
    assert_pulls(EWC(40.0), Context(profile=profile), wanted, set())
    handle = EWC().apply(double_classifier(), Context(profile=profile))
    assert handle.facts == {"unmeasured": sorted(POOLER)}


def test_ewc_pulls_in_float16_as_in_float32() -> None:
    """A Fisher value, and the square of a distance, may be less than float16 has."""
    profile = random_profile(language_model("bert"))
    profile = replace(profile, diagonal={n: 1e-6 * t for n, t in profile.diagonal.items()})
    penalties = []
    for dtype in (torch.float32, torch.float16):
        model = classifier_of("bert").half().to(dtype).train()
        handle = EWC(1.0).apply(model, Context(profile=profile))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_((parameter + 2.0**-10).half())
        penalties.append(handle.loss(torch.zeros(()), model, {}, None))
    assert penalties[0] > 0
    torch.testing.assert_close(penalties[1].float(), penalties[0], rtol=0.02, atol=0)


def test_ewc_refuses_a_profile_of_means_only() -> None:
    profile = replace(profile_of(language_model("bert")), diagonal={})
    with pytest.raises(ArtefactError, match=r"tensor means only.*the pulls of EWC need them"):
        EWC().apply(double_classifier(), Context(profile=profile))


def test_ewc_with_nothing_to_pull_says_so() -> None:
    model = double_classifier()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in HEAD | POOLER)
    with pytest.raises(ModelError, match=r"none of the trainable pretrained parameters.*unfreeze a layer"):
        EWC().apply(model, Context(profile=random_profile(language_model("bert"))))


@pytest.mark.parametrize("regularizer", [GuidedL2SP(), GuidedDecay()])
def test_guided_pulls_run_the_model_on_the_inputs_that_are_given(regularizer: Regularizer) -> None:
    model, schedule = classifier_of("bert"), guided_schedule()
    seen = []
    model.register_forward_pre_hook(lambda *args: seen.append(args[-1]["input_ids"].shape), with_kwargs=True)
    with regularizer.apply(model, Context(schedule=schedule, inputs={"input_ids": torch.full((2, 3), 5)})):
        assert set(seen) == {(2, 3)}


def guided_schedule(**options: object) -> DropoutSchedule:
    model = language_model("bert")
    return DropoutSchedule.from_profile(random_profile(model), model, upper=0.2, lower=0.0, **options)


@pytest.mark.parametrize("grouping", ["owner", "dataflow"])
def test_strengths_are_the_rates_of_the_sites_over_their_mean(grouping: str) -> None:
    schedule = guided_schedule(grouping=grouping)
    strengths = relative_strengths(classifier_of("bert"), schedule)
    assert list(strengths) == NAMES
    rate = schedule.rates["bert.encoder.layer.1.output.dropout"] / schedule.mean_rate
    for part in ("dense.weight", "dense.bias", "LayerNorm.weight")[: 3 if grouping == "owner" else 2]:
        assert strengths[f"bert.encoder.layer.1.output.{part}"] == pytest.approx(rate)
    middle = strengths["bert.encoder.layer.1.intermediate.dense.weight"]
    assert middle == (1.0 if grouping == "owner" else pytest.approx(rate))
    assert {strengths[n] for n in HEAD} == {1.0}
    least = min(schedule.scores, key=lambda path: schedule.scores[path])
    assert max(strengths.values()) == pytest.approx(schedule.rates[least] / schedule.mean_rate)
    assert min(strengths.values()) == 0.0


def test_a_schedule_by_call_weighs_each_parameter_by_the_calls_that_it_feeds() -> None:
    model = language_model("albert")
    schedule = DropoutSchedule.from_profile(random_profile(model), model, per_call=True)
    fed = {site.path: site.parameters for site in find_sites(model, per_call=True)}
    for name, strength in relative_strengths(model, schedule).items():
        rates = [rate for path, rate in schedule.rates.items() if name in fed[path]]
        assert strength == (pytest.approx(fmean(rates) / schedule.mean_rate) if rates else 1.0)


def test_a_uniform_schedule_is_no_guidance() -> None:
    model = classifier_of("bert")
    assert set(relative_strengths(model, DropoutSchedule.uniform(model, 0.1)).values()) == {1.0}
    with pytest.raises(ScheduleError, match="rates are all 0"):
        relative_strengths(model, DropoutSchedule.uniform(model, 0.0))


def test_guided_l2_sp_follows_the_schedule() -> None:
    schedule = guided_schedule()
    strengths = relative_strengths(classifier_of("bert"), schedule)
    wanted = {n: 0.3 if n in HEAD else 0.7 * strengths[n] for n in NAMES}
    assert_pulls(GuidedL2SP(alpha=0.7, beta=0.3), Context(schedule=schedule), wanted, HEAD)


def decaying_groups(model: nn.Module, decay: float) -> list[dict]:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    return [
        {"params": matrices, "lr": 0.01, "weight_decay": decay},
        {"params": vectors, "lr": 0.01, "weight_decay": 0.0},
    ]


def test_guided_decay_spreads_the_decay_and_spares_what_does_not_decay() -> None:
    model, schedule = classifier_of("bert").double(), guided_schedule()
    strengths = relative_strengths(model, schedule)
    with GuidedDecay().apply(model, Context(schedule=schedule)) as handle:
        groups = handle.parameter_groups(decaying_groups(model, 0.5))
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.AdamW(groups).step()
    for name, parameter in model.named_parameters():
        shrunk = 1 - 0.01 * 0.5 * strengths[name] if parameter.dim() > 1 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * shrunk)


def test_guided_decay_takes_named_parameters_and_refuses_those_of_another_model() -> None:
    model = classifier_of("bert")
    handle = GuidedDecay().apply(model, Context(schedule=guided_schedule()))
    named = [{**g, "params": [(n, p) for n, p in model.named_parameters() if any(p is q for q in g["params"])]}
             for g in decaying_groups(model, 0.5)]  # fmt: skip
    bare = handle.parameter_groups(decaying_groups(model, 0.5))
    assert [g["weight_decay"] for g in handle.parameter_groups(named)] == [g["weight_decay"] for g in bare]
    assert len({g["weight_decay"] for g in bare}) > 2
    with pytest.raises(GuidedDropoutError, match=r"none of the .* is of the model that guided weight decay"):
        handle.parameter_groups(decaying_groups(classifier_of("bert"), 0.5))


def test_a_classifier_that_names_no_backbone_is_asked_what_is_new() -> None:
    """Its new head would pass for pretrained, and be pulled to its random start."""
    config = WhisperConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, num_mel_bins=4, max_source_positions=8, vocab_size=32,
        classifier_proj_size=8, num_labels=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    model = WhisperForAudioClassification(config)
    with pytest.raises(ModelError, match=r"does not say which of its parts is the backbone.*give Context"):
        L2SP().apply(model, Context())
    new = ["projector.weight", "projector.bias", "classifier.weight", "classifier.bias"]
    assert L2SP().apply(model, Context(new=new)).facts["new"] == sorted(new)


def test_guided_decay_without_decay_says_so() -> None:
    model = classifier_of("bert")
    with (
        GuidedDecay().apply(model, Context(schedule=guided_schedule())) as handle,
        pytest.raises(GuidedDropoutError, match=r"no weight decay to spread.*set weight_decay"),
    ):
        handle.parameter_groups(decaying_groups(model, 0.0))
