"""The batched Fisher of each family of language models, in float64, against the loop and the model's own loss."""

import gc

import pytest
import torch
from families import FAMILIES, FISHER_ONLY, PARTLY_FLOAT32, language_model, objective_of
from fisher_oracles import assert_exact, draw_samples, own_loss_oracle

from guided_dropout import estimate_fisher
from guided_dropout.fisher.plan import make_plan
from guided_dropout.objectives import Objective

ALL = [*FAMILIES, *FISHER_ONLY]
# Longformer's softmax is in float32: in float64, masks in rows that see nothing but padding overflow there, in the
# model's own gradients too. With these lengths each row of its one window sees a token.
LENGTHS = {"longformer": [14, 16, 15, 13, 16]}


def samples_of(family):
    return draw_samples(LENGTHS.get(family, [9, 5, 11, 7, 9]))


@pytest.fixture(scope="module", params=ALL)
def measured(request):
    """(family, model in float64, its profile, measured in padded batches)."""
    model = language_model(request.param).double()
    return request.param, model, estimate_fisher(model, samples_of(request.param), batch_size=3)


def test_each_family_is_exact_in_float64(measured):
    """Against the loop; all by rule, so that a broken rule cannot hide behind the loop."""
    family, model, fast = measured
    slow = estimate_fisher(model, samples_of(family), method="reference")
    assert fast.objective == objective_of(family)
    assert fast.coverage["reasons"] == {}
    assert fast.coverage["parameters_by_rule"] == 1
    for name, want in slow.diagonal.items():
        rtol, rel = (1e-5, 1e-6) if family in PARTLY_FLOAT32 else (2e-6, 1e-9)
        torch.testing.assert_close(fast.diagonal[name], want, rtol=rtol, atol=1e-12)
        assert fast.tensor_means[name] == pytest.approx(slow.tensor_means[name], rel=rel, abs=1e-16)


def test_each_family_agrees_with_the_models_own_loss(measured):
    """Nothing of ours in the oracle but the sum of squares; a tensor for each floating-point parameter."""
    family, model, profile = measured
    assert set(profile.diagonal) == {n for n, p in model.named_parameters() if p.is_floating_point()}
    assert_exact(profile.diagonal, own_loss_oracle(model, samples_of(family)))


@pytest.mark.parametrize("family", ALL)
def test_a_batch_leaves_nothing_behind(family):
    """A cycle through autograd's graph would never be freed, and memory would grow with each batch."""
    model, samples = language_model(family), samples_of(family)
    live = []
    for batches in (1, 3):
        estimate_fisher(model, samples[:2] * batches, batch_size=2)
        gc.collect()
        live.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
    assert live[0] == live[1]


@pytest.mark.parametrize("family", ["longformer", "mixtral", "qwen2_moe", "gemma2"])
def test_float32_agrees_with_float64(family):
    model = language_model(family)
    samples = draw_samples([9, 5, 11, 7, 9])
    found = estimate_fisher(model, samples, batch_size=3)
    assert found.coverage["fallback"] == []
    if family == "longformer":
        slow = estimate_fisher(model, samples, method="reference").diagonal
    else:
        slow = estimate_fisher(model.double(), samples, method="reference").diagonal
    largest = max(t.norm() for t in slow.values())
    for name, want in slow.items():
        assert (found.diagonal[name] - want).norm() <= 1e-4 * want.norm() + 1e-10 * largest, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["bert", "gpt2", "gemma2", "t5", "mixtral", "mamba"])
def test_half_precision_runs(family, dtype):
    model = language_model(family).to(dtype)
    profile = estimate_fisher(model, draw_samples([9, 5, 7]), batch_size=2)
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in profile.diagonal.values())
    assert sum(profile.tensor_means.values()) > 0


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_order_batching_and_padding_change_nothing(family):
    model = language_model(family).double()
    samples = draw_samples([4, 13, 6, 9, 9, 12, 3])
    once = estimate_fisher(model, samples, batch_size=1)
    order = [3, 0, 6, 5, 1, 4, 2]
    again = estimate_fisher(model, [samples[i] for i in order], batch_size=7)
    for name, mean in once.tensor_means.items():
        assert again.tensor_means[name] == pytest.approx(mean, rel=1e-9, abs=1e-16)


@pytest.mark.parametrize("lengths", [[8, 8, 8, 8], [8, 6, 7, 8]])
@pytest.mark.parametrize("family", ["t5", "gemma2", "longformer", "mixtral", "xlnet"])
def test_with_and_without_padding(family, lengths):
    """Models leave the mask out where nothing is padded: other operations than in a padded batch."""
    model = language_model(family, **({"attention_window": 4} if family == "longformer" else {}))
    model = model if family == "longformer" else model.double()
    samples = draw_samples([*lengths, *lengths[::-1]])
    found = estimate_fisher(model, samples, batch_size=4)
    assert found.coverage["fallback"] == []
    slow = estimate_fisher(model, samples, method="reference")
    rtol = 1e-4 if family == "longformer" else 1e-6
    assert_exact(found.diagonal, slow.diagonal, rtol=rtol)


def test_global_attention_of_longformer():
    model = language_model("longformer", attention_window=8).double()
    samples = draw_samples([8, 8, 16, 16])
    for s in samples:
        s["global_attention_mask"] = torch.zeros_like(s["input_ids"])
        s["global_attention_mask"][0] = 1
    profile = estimate_fisher(model, samples, batch_size=2)
    assert "longformer.encoder.layer.0.attention.self.query_global.weight" not in profile.coverage["untouched"]
    assert_exact(profile.diagonal, own_loss_oracle(model, samples))


@pytest.mark.parametrize("family", ["bert", "xlnet"])
def test_token_types(family):
    """A table that the batch looks up once where a caller gives no token types, and per sample where one does."""
    model = language_model(family).double()
    samples = draw_samples([9, 5, 11])
    for s in samples:
        s["token_type_ids"] = (torch.arange(len(s["input_ids"])) > 3).long()
    profile = estimate_fisher(model, samples, batch_size=3)
    assert profile.coverage["fallback"] == []
    assert_exact(profile.diagonal, own_loss_oracle(model, samples))


# What a whole batch shares in a forward, so that hooks on modules see one row for all samples.
BROADCAST = {
    "bert": ["position_embeddings.weight", "token_type_embeddings.weight"],
    "gpt2": ["wpe.weight"],
    "opt": ["embed_positions.weight"],
    "bart": ["embed_positions.weight"],
    "t5": ["relative_attention_bias.weight"],
    "mt5": ["relative_attention_bias.weight"],
    "deberta-v2": ["rel_embeddings.weight", "encoder.LayerNorm.weight", "key_proj.weight", "query_proj.weight"],
    "xlnet": ["rel_attn.r", "rel_attn.r_r_bias", "rel_attn.r_w_bias"],
    "longformer": ["position_embeddings.weight"],
}


@pytest.mark.parametrize("family", BROADCAST)
def test_parameters_that_the_batch_shares_are_squared_per_sample(family):
    """Against one sample at a time, and well away from the square of the batch's gradient."""
    model = language_model(family).double()
    samples = samples_of(family)[:4]
    together = estimate_fisher(model, samples, batch_size=4)
    oracle = own_loss_oracle(model, samples)
    for part in BROADCAST[family]:
        names = [n for n in oracle if n.endswith(part)]
        assert names
        for name in names:
            assert oracle[name].any()
            assert name not in together.coverage["fallback"]
            assert_exact({name: together.diagonal[name]}, {name: oracle[name]})


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "gemma2", "mixtral", "longformer", "opt", "falcon"])
def test_the_head_sees_target_positions_only(family):
    model = language_model(family).requires_grad_(False)
    parameters = dict(model.named_parameters())
    plan = make_plan(model, Objective(objective_of(family)), parameters, draw_samples([9])[0])
    assert plan.head is model.get_output_embeddings()


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_experts_that_no_sample_reaches_are_named(family):
    model = language_model(family, num_experts_per_tok=1).double()
    samples = draw_samples([4, 3], share=1.0)
    profile = estimate_fisher(model, samples, batch_size=2)
    oracle = own_loss_oracle(model, samples)
    assert_exact(profile.diagonal, oracle)
    idle = {f"{n}[{e}]" for n, t in oracle.items() if t.dim() == 3 for e in range(len(t)) if not t[e].any()}
    assert idle
    assert {n for n in profile.coverage["untouched"] if profile.diagonal[n.partition("[")[0]].dim() == 3} == idle


def test_parameters_in_no_operation_are_named():
    model = language_model("xlnet").double()
    profile = estimate_fisher(model, draw_samples([9, 5]), batch_size=2)
    assert "transformer.mask_emb" in profile.coverage["untouched"]
    assert all(not profile.diagonal[n].any() for n in profile.coverage["untouched"])
    reached = set(profile.diagonal) - set(profile.coverage["untouched"])
    assert all(profile.diagonal[n].any() for n in reached)


def test_the_experts_are_put_back():
    model = language_model("mixtral")
    before = model.get_experts_implementation()
    estimate_fisher(model, draw_samples([9]))
    assert model.get_experts_implementation() == before
