"""Attention in half precision on a CPU."""

import copy

import pytest
import torch
import torch.nn.functional as F
from families import language_model
from fisher_oracles import draw_samples
from transformers import AttentionInterface

from guided_dropout.fisher.attention import WideAttention
from guided_dropout.fisher.estimate import estimate_fisher

MASKS = {
    "none": {},
    "bool": {"attn_mask": torch.ones(5, 7, dtype=torch.bool).tril(2)},
    "added": {"attn_mask": torch.ones(5, 7).tril(2).log().clamp(min=-100)},
    "causal, scaled": {"is_causal": True, "scale": 0.3},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("mask", MASKS)
def test_it_is_that_of_float32_rounded(mask, dtype):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, t, 4, generator=g).to(dtype).requires_grad_() for t in (5, 7, 7))
    options = {n: o.to(dtype) if n == "attn_mask" and o.is_floating_point() else o for n, o in MASKS[mask].items()}
    with WideAttention():
        out = F.scaled_dot_product_attention(q, k, value=v, **options)
    assert out.dtype == dtype
    wide = [t.detach().float().requires_grad_() for t in (q, k, v)]
    if "attn_mask" in options and options["attn_mask"].is_floating_point():
        options["attn_mask"] = options["attn_mask"].float()
    want = F.scaled_dot_product_attention(*wide, **options)
    assert torch.equal(out, want.to(dtype))
    found = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    for ours, theirs in zip(found, torch.autograd.grad(want, wide, torch.ones_like(want)), strict=True):
        assert torch.equal(ours, theirs.to(dtype))


def _in_float32(module, query, key, value, attention_mask, **options):
    mask = (
        attention_mask.float() if attention_mask is not None and attention_mask.is_floating_point() else attention_mask
    )
    out = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), attn_mask=mask)
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


def test_a_model_in_bfloat16_is_measured_with_it():
    AttentionInterface.register("test_float32", _in_float32)
    model, samples = language_model("bert").bfloat16(), draw_samples([12] * 4)
    other = copy.deepcopy(model)
    other.set_attn_implementation("test_float32")
    found, want = (estimate_fisher(m, samples).tensor_means for m in (model, other))
    assert found == pytest.approx(want, rel=1e-6)
