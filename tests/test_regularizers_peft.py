"""Regularizers on models with adapters: what an adapter adds is new, and belongs to the layer that it adapts."""

from __future__ import annotations

import pytest
import torch
from families import classifier_of, language_model, profile_of
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model
from torch import nn

from guided_dropout import estimate_fisher
from guided_dropout.errors import ModelError
from guided_dropout.regularizers import EWC, L2SP, ChildTuning, Context, Mixout, Regularizer, Surgical

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

PROFILE = profile_of(language_model("bert"))


def adapted(*, unfrozen: str = "-") -> nn.Module:
    config = LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])
    model = get_peft_model(classifier_of("bert"), config)
    for name, parameter in model.named_parameters():
        if unfrozen in name:
            parameter.requires_grad_(True)
    return model.train()


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("regularizer", [L2SP(), Mixout(), EWC(), ChildTuning()], ids=lambda r: type(r).__name__)
def test_where_only_adapters_train_nothing_is_pretrained(regularizer: Regularizer) -> None:
    with pytest.raises(ModelError, match="what adapters add is new; expected some: unfreeze pretrained layers"):
        regularizer.apply(adapted(), Context(profile=PROFILE))


def test_l2_sp_holds_what_is_pretrained_at_its_start_and_adapters_at_0() -> None:
    model = adapted(unfrozen="output.LayerNorm").double()
    handle = L2SP(alpha=0.7, beta=0.3).apply(model, Context())
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data += 0.5
    loss = handle.loss(torch.tensor(0.0, dtype=torch.float64), model, {}, None)
    wanted = 0.0
    for name, p in model.named_parameters():
        if "LayerNorm" in name and p.requires_grad:
            wanted += 0.35 * (p - start[name]).square().sum().item()
        elif p.requires_grad:
            wanted += 0.15 * p.square().sum().item()
    assert "lora_A" in str(handle.facts["new"])
    assert loss.item() == pytest.approx(wanted)


def with_copies() -> nn.Module:
    config = LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier", "output.dense", "LayerNorm"])
    return get_peft_model(classifier_of("bert"), config).double().train()


def test_copies_of_pretrained_layers_are_pretrained() -> None:
    model = with_copies()
    copies = {n for n in trainable(model) if "modules_to_save" in n and "classifier" not in n}
    assert any("LayerNorm" in name for name in copies)
    handle = L2SP(alpha=1.0, beta=1.0).apply(model, Context())
    assert set(handle.facts["new"]) == trainable(model) - copies
    start = handle.loss(torch.tensor(0.0, dtype=torch.float64), model, {}, None)
    new = [p for n, p in model.named_parameters() if n in handle.facts["new"]]
    assert start.item() == pytest.approx(sum(0.5 * p.square().sum().item() for p in new))
    handle.remove()
    handle = EWC(40.0).apply(model, Context(profile=PROFILE))
    loss = handle.loss(torch.tensor(0.0, dtype=torch.float64), model, {}, None)
    loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == copies
    assert Mixout().apply(model, Context()).facts["mixed"] == sum(
        "dense.modules_to_save.default.weight" in n for n in copies
    )
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    measured = ChildTuning().apply(model, Context(profile=PROFILE)).facts["measured"]
    assert measured == sum(sizes[name] for name in copies)


@pytest.mark.parametrize(
    ("config", "at_0"),
    [
        (LoraConfig(r=2, target_modules=["query"], use_dora=True), {"lora_A"}),  # LoRA's B is 0 as it is
        (IA3Config(target_modules=["query", "output.dense"], feedforward_modules=["output.dense"]), set()),
        (LoraConfig(r=2, target_modules=["query"], trainable_token_indices={"word_embeddings": [60, 61]}), {"lora_A"}),
        (LoraConfig(r=2, target_modules=["query"], init_lora_weights="pissa"), set()),
    ],
    ids=["dora", "ia3", "tokens", "pissa"],
)
def test_l2_sp_holds_at_its_start_what_would_change_the_model_at_0(config: PeftConfig, at_0: set[str]) -> None:
    model = get_peft_model(classifier_of("bert"), config).train()
    model.get_parameter("base_model.model.bert.pooler.dense.weight").requires_grad_(True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    L2SP(alpha=1.0, beta=1.0).apply(model, Context()).loss(torch.tensor(0.0), model, {}, None).backward()
    pulled = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()]
    assert {name.split(".")[-3] for name in pulled if "classifier" not in name} == at_0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_what_is_new_may_be_named_as_before_the_wrapping_and_a_slip_is_told() -> None:
    new = {"classifier.weight", "classifier.bias"}
    facts = L2SP().apply(adapted(unfrozen="pooler"), Context(new=new)).facts
    assert facts["new"] == [
        f"base_model.model.classifier.modules_to_save.default.{part}" for part in ("bias", "weight")
    ]
    with pytest.raises(ModelError, match=r"names 'clasifier\.weight', which BertForSequenceClassification has not"):
        L2SP().apply(classifier_of("bert"), Context(new={"clasifier.weight", "classifier.bias"}))


def test_mixout_mixes_what_is_pretrained_and_no_adapter() -> None:
    handle = Mixout(0.5).apply(adapted(unfrozen="layer.0.output.dense"), Context())
    assert handle.facts == {"mixed": 1, "untouched": 1}


def test_ewc_pulls_what_is_pretrained_and_measured() -> None:
    model = adapted(unfrozen="layer.0.output.dense")
    handle = EWC().apply(model, Context(profile=PROFILE))
    assert handle.facts == {"unmeasured": []}


def test_surgery_trains_the_adapters_of_the_chosen_layers() -> None:
    model = adapted()
    before = trainable(model)
    with Surgical(0.5).apply(model, Context(profile=PROFILE)) as handle:
        (layer,) = handle.facts["trained"]
        assert trainable(model) == {n for n in before if f"{layer}." in n or "classifier" in n} < before
    assert trainable(model) == before


def test_surgery_outlasts_that_an_adapter_is_turned_off_for_a_while() -> None:
    """As for the reference of DPO: PEFT lets all of the adapter train again at the end."""
    model = get_peft_model(classifier_of("bert"), LoraConfig(target_modules=["query"], init_lora_weights=False)).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = {"input_ids": torch.tensor([[2, 5, 7, 3]]), "labels": torch.tensor([1])}
    with Surgical(0.5).apply(model, Context(profile=PROFILE)) as handle:
        (layer,) = handle.facts["trained"]
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for _ in range(2):
            with torch.no_grad(), model.disable_adapter():
                model(**batch)
            model(**batch).loss.backward()
            idle = [p for n, p in model.named_parameters() if "lora" in n and layer not in n]
            assert not any(p.grad is not None and p.grad.any() for p in idle)  # so that clipping does not count them
            optimizer.step()
            optimizer.zero_grad()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora" in name and layer in name}


def test_an_adapter_that_was_trained_before_is_held_by_its_own_fisher_information() -> None:
    model = adapted()
    new = {name for name in trainable(model) if "classifier" in name}
    samples = [{"input_ids": torch.tensor([2, 5, 7, 3]), "labels": torch.tensor(1)}]
    profile = estimate_fisher(model.eval(), samples, parameters="all")
    handle = EWC(40.0).apply(model, Context(profile=profile, new=new))
    held = {n: p for n, p in model.named_parameters() if p.requires_grad and n not in new}
    for parameter in held.values():
        parameter.data += 0.5
    loss = handle.loss(torch.tensor(0.0), model, {}, None)
    assert loss.item() == pytest.approx(sum(40.0 / 2 * 0.25 * profile.diagonal[n].sum().item() for n in held)) != 0
    assert L2SP().apply(model, Context(new=new)).facts == {"pretrained": len(held), "new": sorted(new)}
