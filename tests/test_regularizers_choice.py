"""Regularizers that choose what trains, and how fast: Child-Tuning, surgical fine-tuning, layer-wise decay."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
import transformers as hf
from families import FAMILIES, classifier_of, language_model, profile_of
from test_regularizers_pull import HEAD, POOLER, random_profile
from torch import Tensor, nn

from guided_dropout.errors import ArtefactError, GuidedDropoutError, ModelError
from guided_dropout.regularizers import ChildTuning, Context, LayerwiseDecay, Surgical
from guided_dropout.regularizers.layers import find_layers, parameters_in_order

BATCH = {"input_ids": torch.tensor([[5, 6, 7, 8, 9, 2], [7, 6, 5, 9, 8, 2]]), "labels": torch.tensor([0, 1])}


def copies(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def train(model: nn.Module, kind: type[torch.optim.Optimizer], **options: float) -> None:
    """Two steps with weight decay and momentum, on all parameters."""
    optimizer = kind(model.parameters(), lr=0.01, weight_decay=0.1, **options)
    for _ in range(2):
        optimizer.zero_grad()
        model(**BATCH).loss.backward()
        optimizer.step()


# --- Child-Tuning


OPTIMIZERS = [
    (torch.optim.AdamW, {}),
    (torch.optim.AdamW, {"fused": True}),
    (torch.optim.Adam, {}),
    (torch.optim.SGD, {"momentum": 0.9}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
def test_what_is_outside_of_the_child_stays_bit_for_bit(kind: type[torch.optim.Optimizer], options: dict) -> None:
    model = classifier_of("bert").train()
    profile = random_profile(language_model("bert"))
    before = copies(model)
    with ChildTuning(0.2).apply(model, Context(profile=profile)) as handle:
        train(model, kind, **options)
    held = {n: profile.diagonal[n] for n in before if n not in HEAD | POOLER}
    edge = torch.cat([f.flatten() for f in held.values()]).quantile(0.8)
    for name, parameter in model.named_parameters():
        same = parameter.detach() == before[name]
        outside = held[name] < edge if name in held else torch.zeros_like(same)
        assert bool(same[outside].all()), name
        # With decay each trained weight moves, but for those at 0.
        assert bool((~same | outside | (before[name] == 0)).all()), name
    assert handle.facts["trained"] == round(0.2 * handle.facts["measured"])
    assert handle.facts["unmeasured"] == sorted(POOLER)


def test_the_child_gets_the_gradient_of_the_whole_and_the_rest_none() -> None:
    model = classifier_of("bert")  # in evaluation mode: the same loss twice
    profile = random_profile(language_model("bert"))
    names, parameters = zip(*model.named_parameters(), strict=True)
    whole = dict(zip(names, torch.autograd.grad(model(**BATCH).loss, parameters), strict=True))
    with ChildTuning(0.5).apply(model, Context(profile=profile)):
        model(**BATCH).loss.backward()
    edge = torch.cat([f.flatten() for n, f in profile.diagonal.items() if n.startswith("bert.")]).median()
    for name, parameter in model.named_parameters():
        child = profile.diagonal[name] >= edge if name not in HEAD | POOLER else torch.ones_like(parameter).bool()
        torch.testing.assert_close(parameter.grad, torch.where(child, whole[name], 0.0))


def test_noise_in_the_profile_takes_no_part() -> None:
    """However large its values are: they are rounding errors of a gradient that is 0."""
    model, profile = classifier_of("bert").train(), random_profile(language_model("bert"))
    noise = "bert.encoder.layer.0.attention.self.key.bias"
    loud = {**profile.diagonal, noise: torch.full_like(profile.diagonal[noise], 9.0)}
    profile = replace(profile, diagonal=loud, tensor_means={**profile.tensor_means, noise: 9.0}, noise=[noise])
    before = copies(model)
    with ChildTuning(0.1).apply(model, Context(profile=profile)):
        train(model, torch.optim.AdamW)
    assert torch.equal(model.get_parameter(noise), before[noise])
    assert not torch.equal(
        model.bert.embeddings.word_embeddings.weight, before["bert.embeddings.word_embeddings.weight"]
    )
    with Surgical().apply(model, Context(profile=profile)) as handle:
        assert max(handle.facts["scores"].values()) < 1


def test_other_optimizers_are_left_alone() -> None:
    model, other = classifier_of("bert").train(), nn.Linear(2, 2)
    context = Context(profile=random_profile(language_model("bert")))
    with ChildTuning(0.1).apply(model, context):
        optimizer = torch.optim.SGD(other.parameters(), lr=1.0)
        for parameter in [*model.parameters(), *other.parameters()]:
            parameter.data += 1.0
            parameter.grad = torch.ones_like(parameter)
        here, there = copies(model), copies(other)
        optimizer.step()
        assert all(torch.equal(p, here[n]) for n, p in model.named_parameters())
        assert all(torch.equal(p, there[n] - 1) for n, p in other.named_parameters())


# --- surgical fine-tuning


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
def test_only_the_chosen_layers_and_the_new_train(kind: type[torch.optim.Optimizer], options: dict) -> None:
    model = classifier_of("bert", num_hidden_layers=4).train()
    source = language_model("bert", num_hidden_layers=4)
    best = profile_of(source, **{n: 100.0 for n, _ in source.named_parameters() if "layer.2." in n})
    before = copies(model)
    with Surgical(0.3).apply(model, Context(profile=best, new=HEAD | POOLER)) as handle:
        train(model, kind, **options)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    wanted = {n for n in before if "layer.2." in n or "layer.3." in n} | HEAD | POOLER
    assert moved == wanted
    assert handle.facts["trained"] == ["bert.encoder.layer.2", "bert.encoder.layer.3"]
    assert handle.facts["scores"]["bert.encoder.layer.2"] == pytest.approx(100.0)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("first", [0, 1])
def test_two_that_freeze_leave_nothing_frozen_whichever_goes_first(first: int) -> None:
    model = classifier_of("bert", num_hidden_layers=4)
    context = Context(profile=random_profile(language_model("bert", num_hidden_layers=4)))
    held = model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    handles = [Surgical(share).apply(model, context) for share in (0.5, 0.25)]
    handles.pop(first).remove()
    handles.pop().remove()
    assert [n for n, p in model.named_parameters() if not p.requires_grad and p is not held] == []
    assert not held.requires_grad


def test_a_layers_score_is_the_mean_over_its_parameters() -> None:
    model, profile = classifier_of("bert"), random_profile(language_model("bert"))
    with Surgical().apply(model, Context(profile=profile)) as handle:
        for path, score in handle.facts["scores"].items():
            held = [f.flatten() for n, f in profile.diagonal.items() if n.startswith(f"{path}.")]
            assert score == pytest.approx(torch.cat(held).double().mean().item())
        assert len(handle.facts["trained"]) == 1


@pytest.mark.parametrize(("share", "layers", "number"), [(0.28, 25, 7), (0.25, 25, 7), (0.1, 3, 1)])
def test_as_many_layers_train_as_the_share_says(share: float, layers: int, number: int) -> None:
    """As people read the numbers: 0.28 * 25 is 7.000000000000001 in floats."""
    size = {"num_hidden_layers": layers, "hidden_size": 4, "intermediate_size": 4}
    model, profile = classifier_of("bert", **size), profile_of(language_model("bert", **size))
    with Surgical(share).apply(model, Context(profile=profile)) as handle:
        assert len(handle.facts["trained"]) == number


def test_means_are_enough_for_surgery_not_for_a_child() -> None:
    model, profile = classifier_of("bert"), random_profile(language_model("bert"))
    means = replace(profile, diagonal={})
    with (
        Surgical().apply(model, Context(profile=profile)) as whole,
        Surgical().apply(model, Context(profile=means)) as few,
    ):
        assert few.facts == whole.facts
    with pytest.raises(ArtefactError, match=r"tensor means only.*the gradient masks of Child-Tuning need them"):
        ChildTuning().apply(model, Context(profile=means))


def test_what_was_frozen_before_stays_frozen_after() -> None:
    model = classifier_of("bert")
    model.bert.embeddings.requires_grad_(False)
    with Surgical().apply(model, Context(profile=profile_of(language_model("bert")))):
        pass
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {
        n for n, _ in model.named_parameters() if ".embeddings." in n
    }


# --- layers and layer-wise decay


@pytest.mark.parametrize(
    ("family", "blocks"),
    [
        ("bert", ["bert.encoder.layer.0", "bert.encoder.layer.1"]),
        ("albert", ["albert.encoder.albert_layer_groups.0"]),
        ("gpt2", ["transformer.h.0", "transformer.h.1"]),
        ("llama", ["model.layers.0", "model.layers.1"]),
        ("t5", [f"transformer.{part}.block.{i}" for part in ("encoder", "decoder") for i in (0, 1)]),
        ("bart", [f"model.{part}.layers.{i}" for part in ("encoder", "decoder") for i in (0, 1)]),
    ],
)
def test_layers_are_found_in_the_order_of_their_use(family: str, blocks: list[str]) -> None:
    model = classifier_of(family)
    layers = find_layers(model)
    assert list(layers.blocks) == blocks
    for place, block in enumerate(blocks, start=1):
        assert {d for n, d in layers.depth.items() if n.startswith(f"{block}.")} == {place}
    first = next(n for n, _ in model.named_parameters() if "embed" in n or "wte" in n or "shared" in n)
    assert layers.depth[first] == 0
    outside = {d for n, d in layers.depth.items() if not n.startswith(model.base_model_prefix)}
    assert outside == {layers.top}


def test_what_follows_the_last_layer_belongs_to_the_head_and_what_lies_between_to_the_layer_before() -> None:
    assert find_layers(classifier_of("gpt2")).depth["transformer.ln_f.weight"] == 3
    assert find_layers(classifier_of("bert")).depth["bert.pooler.dense.weight"] == 3
    depth = find_layers(classifier_of("t5")).depth
    assert depth["transformer.encoder.final_layer_norm.weight"] == 2
    assert depth["transformer.decoder.final_layer_norm.weight"] == 5


XLM_LAYER = "transformer.{{attentions,layer_norm1,ffns,layer_norm2}}.{}".format


@pytest.mark.parametrize("kind", ["XLM", "Flaubert"])
def test_lists_side_by_side_that_are_used_in_turn_are_one_stack(kind: str) -> None:
    """XLM and Flaubert have a list for each part of a layer."""
    size = {"vocab_size": 64, "emb_dim": 16, "n_layers": 3, "n_heads": 2}
    config = getattr(hf, f"{kind}Config")(**size)
    model = getattr(hf, f"{kind}ForSequenceClassification")(config)
    source = getattr(hf, f"{kind}WithLMHeadModel")(config)
    layers = find_layers(model)
    assert layers.blocks == tuple(map(XLM_LAYER, range(3)))
    for part in ("attentions.1.q_lin", "layer_norm1.1", "ffns.1.lin1", "layer_norm2.1"):
        name = f"transformer.{part}.weight"
        assert (layers.depth[name], layers.block_of[name]) == (2, XLM_LAYER(1))
    assert layers.depth["transformer.embeddings.weight"] == 0
    profile = profile_of(source, **{"transformer.ffns.1.lin1.weight": 1e6})
    with Surgical(0.3).apply(model, Context(profile=profile)) as handle:
        assert handle.facts["trained"] == [XLM_LAYER(1)]
        trained = {n for n, p in model.named_parameters() if p.requires_grad and n.startswith("transformer.")}
    assert trained == {n for n in layers.block_of if n.split(".")[2] == "1"}
    held = [f.flatten() for n, f in profile.diagonal.items() if layers.block_of.get(n) == XLM_LAYER(0)]
    assert handle.facts["scores"][XLM_LAYER(0)] == pytest.approx(torch.cat(held).double().mean().item())


class Lists(nn.Module):
    """Two lists of layers, used in turn or one after another."""

    def __init__(self, in_turn: bool, lengths: tuple[int, int] = (3, 3)) -> None:
        super().__init__()
        self.a, self.b = (nn.ModuleList(nn.Linear(3, 3) for _ in range(length)) for length in lengths)
        self.in_turn = in_turn

    def forward(self, x: Tensor) -> Tensor:
        turns = itertools.chain(*zip(self.a, self.b, strict=False)) if self.in_turn else (*self.a, *self.b)
        for layer in turns:
            x = layer(x)
        return x


def test_lists_that_are_used_one_after_another_or_differ_in_length_are_stacks_of_their_own() -> None:
    x = {"x": torch.randn(1, 3)}
    assert find_layers(Lists(in_turn=True), x).blocks == tuple(f"{{a,b}}.{i}" for i in range(3))
    assert find_layers(Lists(in_turn=False), x).blocks == tuple(f"{part}.{i}" for part in "ab" for i in range(3))
    unlike = find_layers(Lists(in_turn=True, lengths=(3, 4)), x)
    assert unlike.blocks == ("a.0", "b.0", "a.1", "b.1", "a.2", "b.2")
    assert unlike.depth["b.3.weight"] == 7


def test_order_comes_from_running_not_from_names() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
            self.start = nn.Linear(3, 3)
            self.unused = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.start(x)
            for layer in list(self.layers)[::-1]:
                x = layer(x)
            return x

    model, x = Backwards(), {"x": torch.randn(1, 3)}
    layers = find_layers(model, x)
    assert layers.blocks == ("layers.2", "layers.1", "layers.0")
    assert (layers.depth["start.weight"], layers.depth["unused.weight"]) == (0, 4)
    assert parameters_in_order(model, x)[:3] == ["start.weight", "start.bias", "layers.2.weight"]
    with pytest.raises(ModelError, match="no list of layers"):
        find_layers(model.start, {"input": torch.randn(1, 3)})


@pytest.mark.parametrize("family", FAMILIES)
def test_learning_rates_fall_geometrically_and_each_parameter_has_one(family: str) -> None:
    model = classifier_of(family)
    layers = find_layers(model)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "lr": 0.5, "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "lr": 0.5, "weight_decay": 0.0},
    ]
    with LayerwiseDecay(0.8).apply(model, Context()) as handle:
        finer = handle.parameter_groups(groups)
    rate = {id(p): (group["lr"], group["weight_decay"]) for group in finer for p in group["params"]}
    assert sum(len(group["params"]) for group in finer) == len(rate) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        expected = 0.5 * 0.8 ** (layers.top - layers.depth[name])
        assert rate[id(parameter)] == (pytest.approx(expected), 0.1 if parameter.dim() > 1 else 0.0)
    assert finer[0]["lr"] == 0.5
    used = sorted({group["lr"] for group in finer}, reverse=True)
    assert all(math.isclose(b / a, 0.8) for a, b in itertools.pairwise(used))


def test_learning_rates_fall_for_named_parameters_too_and_others_are_refused() -> None:
    model = classifier_of("bert")
    handle = LayerwiseDecay(0.5).apply(model, Context())
    bare, named = (
        handle.parameter_groups([{"params": list(params), "lr": 1.0, "weight_decay": 0.1}])
        for params in (model.parameters(), model.named_parameters())
    )
    assert [g["lr"] for g in named] == [g["lr"] for g in bare] == [1.0, 0.5, 0.25, 0.125]
    ids = [[id(p) for p in group["params"]] for group in bare]
    assert [[id(p) for _, p in group["params"]] for group in named] == ids
    torch.optim.AdamW(named)
    other = [{"params": list(classifier_of("bert").parameters()), "lr": 1.0, "weight_decay": 0.1}]
    with pytest.raises(GuidedDropoutError, match="none of the 41 parameters in these groups is of the model"):
        handle.parameter_groups(other)
