"""Regularizers that act by chance: Gaussian dropout, Mixout, R-Drop."""

from __future__ import annotations

import copy
import fnmatch
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, classifier_of, language_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sites_families import build
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from guided_dropout.errors import ModelError, SiteError
from guided_dropout.regularizers import Context, GaussianDropout, Handle, Mixout, RDrop, Regularizer, apply_dropout
from guided_dropout.regularizers.gaussian import gaussian_noise
from guided_dropout.regularizers.mixout import mixout
from guided_dropout.regularizers.r_drop import disagreement
from guided_dropout.schedule import DropoutSchedule
from guided_dropout.tiny_batch import tiny_batch

IDS = torch.tensor([[5, 6, 7, 8, 9, 2], [7, 6, 5, 9, 8, 2]])
PADDED = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


def logits(model: PreTrainedModel, seed: int = 0, **inputs: Tensor) -> Tensor:
    torch.manual_seed(seed)
    return model(input_ids=IDS, **inputs).logits


def assert_recomputed_alike(layer: nn.Module) -> None:
    """The gradient of a layer whose forward runs again in the backward pass is the one without that."""
    x, gradients = torch.randn(2, 6, 16), []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(0)
        y = run(x)
        loss = (y[0] if isinstance(y, tuple) else y).square().sum()
        gradients.append(torch.autograd.grad(loss, layer.intermediate.dense.weight)[0])
    torch.testing.assert_close(gradients[0], gradients[1])


# --- Gaussian dropout


@settings(max_examples=20, deadline=None)
@given(rate=st.floats(0.01, 0.9), seed=st.integers(0, 2**31))
def test_gaussian_noise_has_the_mean_and_variance_of_dropout(rate: float, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.rand(200_000, dtype=torch.float64) + 0.5
    ratio = gaussian_noise(x, rate) / x
    variance, n = rate / (1 - rate), len(x)
    assert abs(ratio.mean().item() - 1) < 6 * math.sqrt(variance / n)
    assert abs(ratio.var().item() - variance) < 6 * variance * math.sqrt(2 / n)
    assert abs(((ratio - 1) ** 4).mean().item() / variance**2 - 3) < 0.4  # of a normal distribution


def test_gaussian_noise_at_rate_0_is_the_input_and_its_gradient_is_the_noise() -> None:
    x = torch.rand(5, requires_grad=True)
    assert gaussian_noise(x, 0.0) is x
    y = gaussian_noise(x, 0.3)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, (y / x).detach())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_dropout_site_gets_gaussian_noise_and_its_own_rate(attention: str) -> None:
    model = classifier_of("bert", attn_implementation=attention).train()
    seen: list[tuple[Tensor, Tensor]] = []
    site = model.bert.encoder.layer[1].output.dropout
    site.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    schedule = DropoutSchedule.uniform(model, 0.0)
    schedule = replace(schedule, rates={**schedule.rates, "bert.encoder.layer.1.output.dropout": 0.4})
    with apply_dropout(model, schedule), GaussianDropout().apply(model, Context()):
        for seed in range(100):
            logits(model, seed)
    x, y = (torch.stack(part) for part in zip(*seen[-100:], strict=True))
    ratio = (y / x).flatten().double()
    assert not (y == 0).any()
    assert ratio.mean().item() == pytest.approx(1, abs=0.03)
    assert ratio.var().item() == pytest.approx(0.4 / 0.6, rel=0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_of_a_family_is_noisy_and_none_drops(family: str) -> None:
    """Attention too; the proof in `apply` would fail otherwise, here the noise is seen in the output."""
    model = classifier_of(family).train()
    with apply_dropout(model, DropoutSchedule.uniform(model, 0.5)), GaussianDropout().apply(model, Context()):
        assert not torch.equal(logits(model, 1), logits(model, 2))
    with apply_dropout(model, DropoutSchedule.uniform(model, 0.0, include_head=True)):
        still = logits(model, 1)
        with GaussianDropout().apply(model, Context()):
            assert torch.equal(logits(model, 2), still)


def test_a_part_in_evaluation_mode_is_not_noisy_though_the_rest_trains() -> None:
    model = classifier_of("bert").train()
    with apply_dropout(model, DropoutSchedule.uniform(model, 0.0, include_head=True)):
        still = logits(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    for layer in model.bert.encoder.layer:
        layer.attention.self.eval()  # says whether attention drops
    with GaussianDropout().apply(model, Context()):
        assert torch.equal(logits(model, 1), still)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "opt"])
def test_noisy_attention_is_the_same_fused_and_eager(family: str) -> None:
    """Eager attention hands its probabilities to dropout; fused attention is computed step by step for the noise."""
    outputs = []
    for attention in ("sdpa", "eager"):
        model = classifier_of(family, attn_implementation=attention).train()
        with apply_dropout(model, DropoutSchedule.uniform(model, 0.3, include_head=True)):
            noisy = GaussianDropout().apply(model, Context())
            outputs.append(logits(model, attention_mask=PADDED))
            noisy.remove()
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("causal", "mask"), [(False, None), (False, "bool"), (False, "float"), (True, None)])
@pytest.mark.parametrize("heads", [4, 2])
def test_attention_step_by_step_is_the_kernels(causal: bool, mask: str | None, heads: int) -> None:
    """With next to no noise; the last query may look at nothing."""
    torch.manual_seed(0)
    q = torch.randn(2, 4, 5, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, heads, 5, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    allowed = torch.rand(2, 1, 5, 5) > 0.3
    allowed[..., 0], allowed[1, 0, 4] = True, False
    bias = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, -math.inf)
    options = {
        "attn_mask": {None: None, "bool": allowed, "float": bias}[mask],
        "is_causal": causal,
        "scale": 0.5,
        "enable_gqa": heads != 4,
    }
    attend = _Attend()
    expected = attend(q, k, v, dropout_p=0.0, **options)
    wanted = torch.autograd.grad(expected.square().sum(), (q, k, v))
    with _noisy(attend):
        found = attend(q, k, v, dropout_p=1e-24, **options)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), (q, k, v)), wanted, rtol=1e-9, atol=1e-9)


class _Attend(nn.Module):
    """A model of one attention call."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_dropout = 0.1

    def forward(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float | None = None, **options: object) -> Tensor:
        rate = self.attention_dropout if dropout_p is None else dropout_p
        return F.scaled_dot_product_attention(q, k, v, dropout_p=rate if self.training else 0.0, **options)


def _noisy(model: nn.Module) -> Handle:
    x = torch.randn(1, 1, 2, 4)
    return GaussianDropout().apply(model.train(), Context(inputs={"q": x, "k": x, "v": x}))


def test_a_rate_of_1_has_no_gaussian_noise() -> None:
    model = language_model("bert")
    model.bert.encoder.layer[0].output.dropout.p = 1.0
    with pytest.raises(SiteError, match=r"encoder\.layer\.0\.output\.dropout has rate 1, which drops all"):
        GaussianDropout().apply(model, Context())


def test_gaussian_noise_survives_gradient_checkpointing() -> None:
    model = classifier_of("bert").train()
    with apply_dropout(model, DropoutSchedule.uniform(model, 0.3)), GaussianDropout().apply(model, Context()):
        assert_recomputed_alike(model.bert.encoder.layer[0])


class Hidden(nn.Module):
    """Drops in a call that has a mask inside of it."""

    def __init__(self, dropout: nn.Dropout):
        super().__init__()
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        return F.alpha_dropout(x, self.dropout.p, self.training)


def test_a_dropout_call_that_takes_no_noise_is_an_error() -> None:
    model = classifier_of("bert").train()
    model.bert.embeddings.dropout = Hidden(model.bert.embeddings.dropout)
    with pytest.raises(
        SiteError, match=r"bert\.embeddings\.dropout\.dropout still drops.*use plain dropout on this model"
    ):
        GaussianDropout().apply(model, Context())
    assert "forward" not in vars(model.bert.embeddings)


# --- Mixout


@settings(max_examples=25, deadline=None)
@given(p=st.floats(0.05, 0.95), seed=st.integers(0, 2**31))
def test_mixed_weights_are_the_formulas_and_unbiased(p: float, seed: int) -> None:
    torch.manual_seed(seed)
    w, start = torch.randn(100_000, dtype=torch.float64), torch.randn(100_000, dtype=torch.float64)
    mixed = mixout(w, start, p)
    replaced = ((1 * start + 0 * w - p * start) / (1 - p), (0 * start + 1 * w - p * start) / (1 - p))
    gaps = torch.stack([(mixed - value).abs() for value in replaced])
    assert gaps.min(0).values.max() < 1e-12 * 100
    share = (gaps[0] < gaps[1]).double().mean().item()
    assert abs(share - p) < 6 * math.sqrt(p * (1 - p) / len(w))
    error = mixed - w
    assert abs(error.mean().item()) < 6 * error.std().item() / math.sqrt(len(w))


def test_the_output_of_a_mixed_linear_layer_is_the_plain_one_on_average() -> None:
    model = classifier_of("bert").double().train()
    layer = model.bert.encoder.layer[0].intermediate.dense
    x = torch.randn(7, 16, dtype=torch.float64)
    with Mixout(0.7).apply(model, Context()):
        torch.manual_seed(0)
        layer.weight.data += torch.randn_like(layer.weight)  # training moved it
        draws = torch.stack([layer(x).detach() for _ in range(3000)])
        model.eval()
        plain = layer(x)
        torch.testing.assert_close(plain, F.linear(x, layer.weight, layer.bias), rtol=0, atol=0)
    error = (draws.mean(0) - plain) / (draws.std(0) / math.sqrt(len(draws)))
    assert error.abs().max().item() < 5
    assert draws.std(0).min() > 0


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "albert", "deberta-v2"])
def test_mixout_at_1_computes_with_the_pretrained_weights_and_at_0_with_the_own(family: str) -> None:
    model = classifier_of(family).train()
    with apply_dropout(model, DropoutSchedule.uniform(model, 0.0, include_head=True)):
        pretrained = logits(model)
        for p in (1.0, 0.0):
            model = classifier_of(family).train()
            with apply_dropout(model, DropoutSchedule.uniform(model, 0.0, include_head=True)):
                handle = Mixout(p).apply(model, Context())
                matrices = [
                    m.weight
                    for n, m in model.base_model.named_modules()
                    if getattr(m, "weight", None) is not None and m.weight.dim() > 1 and not isinstance(m, nn.Embedding)
                ]
                assert handle.facts["mixed"] == len({id(w) for w in matrices})
                for weight in matrices:
                    weight.data += 0.3 * torch.randn_like(weight)
                found = logits(model)
                handle.remove()
                moved = logits(model)
            assert not torch.allclose(moved, pretrained)
            assert torch.equal(found, pretrained if p == 1 else moved)


PARAMETRIZED = "wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original1"
STAYS = {  # trained weights that are no linear layer's
    "vit": ["vit.embeddings.position_embeddings", "vit.embeddings.cls_token", "vit.embeddings.patch_embeddings.*"],
    "xlnet": [*(f"transformer.layer.0.rel_attn.r_{x}_bias" for x in "wrs"), "transformer.mask_emb"],
    "wav2vec2": ["wav2vec2.feature_extractor.conv_layers.1.conv.weight", PARAMETRIZED],
    "mixtral": ["model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"],
}
MIXED = {
    "vit": ["vit.layers.0.attention.q_proj.weight"],
    "xlnet": [*(f"transformer.layer.0.rel_attn.{x}" for x in "qkvor"), "transformer.layer.1.ff.layer_1.weight"],
    "wav2vec2": ["wav2vec2.feature_projection.projection.weight"],
    "mixtral": ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.self_attn.q_proj.weight"],
}


@pytest.mark.parametrize("family", MIXED)
def test_the_weights_of_linear_layers_are_mixed_and_nothing_else(family: str) -> None:
    """Seen in what each module holds while its forward runs: its own parameter, or a draw."""
    model = build(family).train()
    own, batch = dict(model.named_parameters()), tiny_batch(model)
    held: dict[str, bool] = {}

    def look(path: str, module: nn.Module) -> None:
        for name, parameter in own.items():
            if name.rpartition(".")[0] == path:
                held[name] = getattr(module, name.rpartition(".")[2]) is parameter

    for path, module in model.named_modules():
        inner = module.forward
        if path:  # the model's own shows what inputs it takes
            module.forward = lambda *a, _p=path, _m=module, _f=inner, **k: (look(_p, _m), _f(*a, **k))[1]
    with Mixout(0.5).apply(model, Context()) as handle:
        model(**batch)
    names = [name for pattern in STAYS[family] for name in fnmatch.filter(own, pattern)]
    assert len(names) >= len(STAYS[family])
    assert all(held.get(name, True) for name in names), {name: held.get(name) for name in names}
    assert [name for name in MIXED[family] if held[name]] == []
    assert handle.facts["mixed"] == sum(not same for same in held.values()) > 0


def test_mixout_with_no_linear_layer_to_mix_is_refused() -> None:
    model = classifier_of("bert")
    model.bert.requires_grad_(False)
    model.bert.embeddings.requires_grad_(True)
    with pytest.raises(ModelError, match=r"none of the trainable .* is the weight of a linear layer.*unfreeze"):
        Mixout().apply(model, Context())


def test_a_weight_that_two_layers_share_is_mixed_in_both() -> None:
    model = classifier_of("bert").train()
    first, second = (layer.attention.self for layer in model.bert.encoder.layer)
    second.query.weight = first.query.weight
    with apply_dropout(model, DropoutSchedule.uniform(model, 0.0, include_head=True)):
        pretrained = logits(model)
        Mixout(1.0).apply(model, Context())
        first.query.weight.data += 0.3 * torch.randn_like(first.query.weight)
        assert torch.equal(logits(model), pretrained)


def test_a_layer_that_stands_in_two_places_is_mixed_once() -> None:
    """Mixed once for each place, the draws would multiply: a share of 0.75 instead of 0.5."""
    model = classifier_of("bert").double().train()
    model.bert.encoder.layer[1] = model.bert.encoder.layer[0]
    dense = model.bert.encoder.layer[0].intermediate.dense
    start = dense.weight.detach().clone()
    with Mixout(0.5).apply(model, Context()):
        dense.weight.data += 1
        torch.manual_seed(0)
        mixed = dense(torch.eye(16, dtype=torch.float64)).T - dense.bias[:, None]
    share = torch.isclose(mixed, start).double().mean().item()
    assert abs(share - 0.5) < 6 * math.sqrt(0.25 / start.numel())


def test_a_weight_is_mixed_in_whichever_of_its_layers_is_called() -> None:
    model = classifier_of("bert").train()
    layer = model.bert.encoder.layer[0].intermediate
    first, twin = layer.dense, nn.Linear(16, layer.dense.out_features)
    layer.dense = nn.ModuleDict({"idle": first, "used": twin})
    layer.dense.forward = lambda x: twin(x)
    twin.weight = first.weight
    with Mixout(1.0).apply(model, Context()):
        x = torch.randn(3, 16)
        before = twin(x)
        first.weight.data += 1
        torch.testing.assert_close(twin(x), before)


def test_mixout_follows_a_model_into_another_precision() -> None:
    model = classifier_of("bert").train()
    with Mixout(0.5).apply(model, Context()):
        model.to(torch.bfloat16)
        assert logits(model).dtype == torch.bfloat16


def test_the_gradient_goes_to_the_kept_weights_and_none_gets_lost() -> None:
    w, start = torch.randn(1000, requires_grad=True), torch.randn(1000)
    torch.manual_seed(0)
    mixed = mixout(w, start, 0.75)
    (gradient,) = torch.autograd.grad(mixed.sum(), w)
    assert set(gradient.tolist()) == {0.0, 4.0}
    assert torch.equal(gradient == 0, torch.isclose(mixed, start, rtol=1e-6))
    (none,) = torch.autograd.grad(mixout(w, start, 1.0).sum(), w)
    assert torch.equal(none, torch.zeros(1000))


def test_mixout_survives_gradient_checkpointing() -> None:
    model = classifier_of("bert").train()
    with Mixout(0.5).apply(model, Context()):
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        assert_recomputed_alike(model.bert.encoder.layer[0])


def test_new_weights_are_not_mixed() -> None:
    model = classifier_of("bert").train()
    pooler = ["bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"]
    whole, less = Mixout().apply(model, Context()), Mixout().apply(model, Context(new=pooler))
    assert whole.facts["mixed"] - less.facts["mixed"] == 1
    less.remove(), whole.remove()


def test_a_forward_that_raises_leaves_the_own_weights() -> None:
    model = language_model("bert").train()
    weight = model.bert.encoder.layer[0].intermediate.dense.weight
    with Mixout().apply(model, Context()):
        with pytest.raises(RuntimeError):
            model.bert.encoder.layer[0].intermediate.dense(torch.randn(1, 3))
        assert model.bert.encoder.layer[0].intermediate.dense.weight is weight


class Borrows(nn.Module):
    """Uses a layer's weight without calling the layer."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer.weight, self.layer.bias)


def test_a_weight_that_mixout_would_not_reach_is_an_error() -> None:
    model = classifier_of("bert").train()
    model.bert.encoder.layer[1].intermediate.dense = Borrows(model.bert.encoder.layer[1].intermediate.dense)
    with pytest.raises(SiteError, match=r"encoder.layer.1.intermediate.dense.layer.weight is used without a call"):
        Mixout().apply(model, Context())
    dense = model.bert.encoder.layer[0].intermediate.dense
    assert not dense._forward_pre_hooks
    assert "forward" not in vars(dense)


# --- R-Drop


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), classes=st.integers(2, 6), scale=st.floats(0.01, 20))
def test_disagreement_is_half_the_symmetric_divergence(seed: int, classes: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (scale * torch.randn(5, classes, dtype=torch.float64, generator=generator) for _ in range(2))
    expected = 0.0
    for row_a, row_b in zip(a, b, strict=True):
        p, q = torch.distributions.Categorical(logits=row_a), torch.distributions.Categorical(logits=row_b)
        kl = torch.distributions.kl_divergence
        expected += 0.5 * (kl(p, q) + kl(q, p)).item() / 5
    assert disagreement(a, b).item() == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert disagreement(a, a).item() == 0
    assert disagreement(a[:, :1], b[:, :1]).item() == pytest.approx((a[:, 0] - b[:, 0]).square().mean().item())


def test_r_drop_is_two_draws_and_their_disagreement() -> None:
    model = classifier_of("bert").train()
    batch = {"input_ids": IDS, "labels": torch.tensor([0, 1])}
    torch.manual_seed(3)
    first, second = model(**batch), model(**batch)
    assert not torch.equal(first.logits, second.logits)
    expected = (first.loss + second.loss) / 2 + 0.8 * disagreement(first.logits, second.logits)
    torch.manual_seed(3)
    with RDrop(0.8).apply(model, Context()) as handle:
        outputs = model(**batch)
        found = handle.loss(outputs.loss, model, batch, outputs)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.autograd.grad(found, model.classifier.weight)[0].abs().sum() > 0


def test_r_drop_without_dropout_is_the_plain_loss() -> None:
    model = classifier_of("bert").train()
    batch = {"input_ids": IDS, "labels": torch.tensor([0, 1])}
    with (
        apply_dropout(model, DropoutSchedule.uniform(model, 0.0, include_head=True)),
        RDrop(5.0).apply(model, Context()) as h,
    ):
        outputs = model(**batch)
        assert h.loss(outputs.loss, model, batch, outputs).item() == pytest.approx(outputs.loss.item(), rel=1e-6)


def test_r_drop_needs_logits() -> None:
    with RDrop().apply(nn.Linear(1, 1), Context()) as handle, pytest.raises(ModelError, match="no logits"):
        handle.loss(torch.tensor(0.0), lambda: (torch.tensor(0.0),), {}, (torch.tensor(0.0),))  # type: ignore[arg-type]


def test_r_drop_on_several_labels_at_once_is_refused() -> None:
    """Each label has a probability of its own there: the softmax over them says nothing."""
    labels = {"input_ids": IDS, "labels": torch.ones(2, 2)}
    told = classifier_of("bert", problem_type="multi_label_classification")
    with pytest.raises(ModelError, match=r"problem_type is multi_label_classification.*expected one label an example"):
        RDrop().apply(told, Context())
    model = classifier_of("bert").train()  # it sees from the labels what kind of a problem it is
    with RDrop().apply(model, Context()) as handle:
        outputs = model(**labels)
        with pytest.raises(ModelError, match="problem_type is multi_label_classification"):
            handle.loss(outputs.loss, model, labels, outputs)


def test_r_drop_on_a_prediction_for_each_token_is_refused() -> None:
    model, batch = language_model("bert").train(), {"input_ids": IDS, "labels": IDS}
    with RDrop().apply(model, Context()) as handle:
        outputs = model(**batch)
        with pytest.raises(ModelError, match=r"logits of shape \[2, 6, 64\]; expected \[batch, labels\]"):
            handle.loss(outputs.loss, model, batch, outputs)


# --- on top of each other, and compiled


@pytest.mark.parametrize("first", [0, 1])
def test_noise_on_the_same_modules_comes_off_in_any_order(first: int) -> None:
    model = classifier_of("bert").train()
    plain = logits(model)
    for regularizer in (Mixout(0.5), GaussianDropout()):
        handles = [regularizer.apply(model, Context()) for _ in range(2)]
        for parameter in model.parameters():
            parameter.data *= 2  # exact, and back below
        handles[first].remove()
        assert not torch.equal(logits(model, 1), logits(model, 2))
        handles[1 - first].remove()
        for parameter in model.parameters():
            parameter.data /= 2
        assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("regularizer", [GaussianDropout(), Mixout(0.5)])
def test_a_copy_of_a_model_computes_with_its_own_weights(regularizer: Regularizer) -> None:
    """As a loop keeps its best model, or an average of them."""
    model = classifier_of("bert")
    with regularizer.apply(model, Context()):
        best = copy.deepcopy(model)
        wanted = logits(best)
        for parameter in model.parameters():
            parameter.data *= 2
        assert torch.equal(logits(best), wanted)
        assert not torch.equal(logits(model), wanted)
        best.train()(input_ids=IDS).logits.sum().backward()
        assert all(p.grad is not None for p in best.parameters())
        assert all(p.grad is None for p in model.parameters())
        assert not torch.equal(logits(best, 1), logits(best, 2))


def test_a_compiled_model_gets_rates_and_noise_that_come_later_and_loses_them_again() -> None:
    model = classifier_of("bert").train()
    compiled = torch.compile(model, backend="eager")
    plain = logits(model)
    assert torch.equal(logits(compiled), plain)
    for put_on in (
        lambda: apply_dropout(model, DropoutSchedule.uniform(model, 0.4)),
        lambda: GaussianDropout().apply(model, Context()),
        lambda: Mixout(0.5).apply(model, Context()),
    ):
        with put_on():
            for parameter in model.parameters():
                parameter.data *= 2
            assert not torch.equal(logits(model), plain)
            assert torch.equal(logits(compiled), logits(model))
            for parameter in model.parameters():
                parameter.data /= 2
        assert torch.equal(logits(compiled), plain)
