"""What the proof on the first samples does about what does not hold: fewer shortcuts, no padding, the loop."""

import pytest
import torch
from families import language_model
from fisher_oracles import assert_exact, draw_samples, own_loss_oracle
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from guided_dropout import estimate_fisher

_DECODER = {
    "vocab_size": 64, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "decoder_start_token_id": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64,
}  # fmt: skip
_INDEXED = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4, "v_head_dim": 8, "head_dim": 4, "qk_head_dim": 8, "index_n_heads": 2, "index_head_dim": 8,
    "index_topk": 6, "max_position_embeddings": 64, "use_cache": False,
}  # fmt: skip


def of(kind, auto, config):
    torch.manual_seed(0)
    return auto.from_config(AutoConfig.for_model(kind, **config)).double().eval()


def pairs(*, given):
    heard, spoken = (
        draw_samples([6, 6, 9, 20, 13, 20, 14, 11]),
        draw_samples([5, 12, 7, 4, 9, 15, 6, 11], seed=3, share=1),
    )
    samples = [{"input_ids": a["input_ids"], "labels": b["labels"]} for a, b in zip(heard, spoken, strict=True)]
    if given:
        for s in samples:
            s["decoder_input_ids"] = torch.cat([torch.tensor([2]), s["labels"][:-1]])
    return samples


def test_a_shortcut_that_is_off_by_half_a_percent_is_not_taken():
    """NLLB's experts take as many tokens as there are."""
    config = {**_DECODER, "num_experts": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2}
    model, samples = of("nllb-moe", AutoModelForSeq2SeqLM, config), pairs(given=True)
    model.config.use_cache = False
    profile = estimate_fisher(model, samples, batch_size=4)
    oracle = own_loss_oracle(model, samples)
    assert_exact(
        {n: t for n, t in profile.diagonal.items() if n not in profile.noise},
        {n: t for n, t in oracle.items() if n not in profile.noise},
    )
    assert profile.coverage["reasons"] == {}


def test_the_loop_does_not_take_the_blame_for_a_shortcut():
    model, samples = of("mvp", AutoModelForSeq2SeqLM, _DECODER), pairs(given=False)
    profile = estimate_fisher(model, samples, batch_size=4)
    assert_exact(profile.diagonal, own_loss_oracle(model, samples))
    assert profile.coverage["reasons"] == {}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["glm_moe_dsa", "deepseek_v32"])
def test_a_model_that_looks_at_padding_beyond_a_few_tokens_sees_none(kind, dtype):
    """Which of the keys its queries see, six each, goes by padding too."""
    model, samples = of(kind, AutoModelForCausalLM, _INDEXED).to(dtype), draw_samples([6, 6, 9, 24, 13, 24])
    profile = estimate_fisher(model, samples, batch_size=4)
    oracle = own_loss_oracle(model, samples)
    assert_exact(profile.diagonal, oracle, rtol=1e-6 if dtype == torch.float64 else 1e-3)
    assert profile.noise == ()
    assert profile.coverage["reasons"] == {}


def test_a_sample_that_is_another_one_beside_others_takes_the_loop():
    """Whatever is off on the first samples."""
    model, samples = language_model("bert").double(), draw_samples([9, 9, 9, 9, 9])
    layer = model.bert.encoder.layer[0].output
    layer.register_forward_hook(lambda m, args, out: out + 0.1 * (out - out.mean(0, keepdim=True)))
    profile = estimate_fisher(model, samples, batch_size=3)
    assert_exact(profile.diagonal, own_loss_oracle(model, samples))
    assert set(profile.coverage["reasons"].values()) == {"a sample's loss in a batch is not its loss alone"}
    assert profile.noise == ()
