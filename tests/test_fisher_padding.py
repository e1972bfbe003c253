"""Models that look at padding: each sample has the Fisher that it has alone, and none of it is taken for noise."""

import pytest
import torch
from families import language_model
from fisher_oracles import assert_exact, draw_samples, own_loss_oracle
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from guided_dropout import estimate_fisher
from guided_dropout.attention import plain_experts
from guided_dropout.detection import detect_objective
from guided_dropout.fisher.lengths import goes_by_longest
from guided_dropout.landscape.losses import Evaluation

LENGTHS = [9, 5, 11, 7, 9, 12]
_ENCODER = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 32,
}  # fmt: skip
LOOK_AT_IT = {
    "fnet": _ENCODER,
    "convbert": {**_ENCODER, "embedding_size": 16, "conv_kernel_size": 3, "head_ratio": 1, "initializer_range": 0.3},
    "funnel": {
        "block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 24,
    },
}  # fmt: skip


def tiny(kind, auto=AutoModelForMaskedLM):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=64, pad_token_id=0, **LOOK_AT_IT[kind])
    return auto.from_config(config).double().eval()


@pytest.mark.parametrize("kind", LOOK_AT_IT)
def test_a_model_that_looks_at_padding_sees_none(kind):
    model, samples = tiny(kind), draw_samples(LENGTHS)
    profile = estimate_fisher(model, samples, batch_size=3)
    assert_exact(profile.diagonal, own_loss_oracle(model, samples))
    assert profile.noise == estimate_fisher(model, samples, batch_size=1).noise
    assert len(profile.noise) < 3


def test_nor_does_a_classifier():
    model = tiny("fnet", AutoModelForSequenceClassification)
    samples = [{"input_ids": s["input_ids"], "labels": k % 2} for k, s in enumerate(draw_samples(LENGTHS))]
    profile = estimate_fisher(model, samples, batch_size=3)
    assert_exact(profile.diagonal, own_loss_oracle(model, samples))
    assert profile.noise == ()


def test_a_model_that_ranks_tokens_sees_no_padding():
    """Which of equal scores its indexer takes goes by the number of tokens, for some of these samples only."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "deepseek_v32", vocab_size=64, pad_token_id=0, hidden_size=32, intermediate_size=48, moe_intermediate_size=24,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16,
        qk_rope_head_dim=4, qk_nope_head_dim=4, qk_head_dim=8, v_head_dim=8, head_dim=4, index_head_dim=8,
        index_n_heads=2, index_topk=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        n_shared_experts=1, first_k_dense_replace=0, max_position_embeddings=64,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).double().eval()
    model.set_experts_implementation("eager")  # which takes float64
    samples = draw_samples([9, 23, 11, 7, 20, 9, 14, 5])
    assert_exact(estimate_fisher(model, samples, batch_size=3).diagonal, own_loss_oracle(model, samples))


def test_nor_does_one_that_ranks_the_tokens_of_long_texts_alone():
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "doge", vocab_size=64, pad_token_id=0, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, keep_window_size=8, max_position_embeddings=64,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).double().eval()
    # Of the first two samples here padding changes neither's loss.
    samples = draw_samples([9, 23, 11, 7, 20, 9, 14, 5], seed=9)
    assert_exact(estimate_fisher(model, samples, batch_size=3).diagonal, own_loss_oracle(model, samples))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "family", ["bert", "modernbert", "gpt2", "llama", "t5", "bart", "mamba", "mixtral", "qwen2_moe"]
)
def test_a_model_that_does_not_is_run_with_padding(family, dtype):
    model, (sample,) = language_model(family).to(dtype), draw_samples([9])
    with plain_experts(model):
        assert not goes_by_longest(model, detect_objective(model, sample), sample)


def test_a_loss_over_a_text_has_no_padding_in_it_either():
    model, samples = tiny("fnet"), draw_samples(LENGTHS)
    whole = Evaluation(model, samples, batch_size=3)
    with torch.no_grad():
        alone = [model(**{k: v[None] for k, v in s.items()}).loss.item() for s in samples]
    assert whole() == pytest.approx(sum(alone) / len(alone), rel=1e-9)


def test_a_padding_token_of_minus_one_is_none():
    def profile(pad):
        torch.manual_seed(0)
        shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape)).eval()
        model.config.pad_token_id = pad
        return estimate_fisher(model, draw_samples([9, 5]))

    assert profile(-1).tensor_means == profile(0).tensor_means
