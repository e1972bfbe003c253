"""Attention on a CPU, against the formula written out in float64."""

import copy
import os
import shutil
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from families import language_model
from fisher_oracles import draw_samples
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface

from guided_dropout.fisher.attention import OwnAttention
from guided_dropout.fisher.estimate import estimate_fisher

MASKS = {
    "none": {},
    "bool": {"attn_mask": torch.ones(5, 7, dtype=torch.bool).tril(2)},
    "added": {"attn_mask": torch.ones(5, 7).tril(2).log().clamp(min=-100)},
    "causal, scaled": {"is_causal": True, "scale": 0.3},
}
KERNELS = pytest.mark.parametrize("kernel", ["", "off"])


def attention(q, k, v, attn_mask=None, is_causal=False, scale=None, enable_gqa=False):
    """The formula; a query that sees no key gets nothing."""
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = (q.shape[-1] ** -0.5 if scale is None else scale) * (q @ k.mT)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None:
        scores = scores + added(attn_mask)
    weights = (scores - scores.detach().amax(-1, keepdim=True).clamp(min=-1e300)).exp()
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-300) @ v


def added(mask):
    """What a mask adds to the scores."""
    return mask if mask.is_floating_point() else torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)


def with_gradients(function, tensors, gradient, **options):
    """The output, and the gradients of the tensors."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient.to(out.dtype))]


def check(found, tensors, gradient, options, digits):
    """Each within so much of the formula's, of its size and of the output's gradient's: some are zero."""
    options = {n: added(o).double() if n == "attn_mask" else o for n, o in options.items()}
    expected = with_gradients(attention, [t.double() for t in tensors], gradient, **options)
    for ours, want in zip(found, expected, strict=True):
        assert (ours.double() - want).norm() <= digits * (want.norm() + gradient.norm())


def in_memory(draw, t):
    """The same numbers, lying in memory in another way."""
    how = draw(st.sampled_from(["as made", "as layers give them", "with gaps", "the other way round"]))
    if how == "as layers give them":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "with gaps":
        return torch.cat([t, t], -1)[..., : t.shape[-1]]
    return t.mT.contiguous().mT if how == "the other way round" else t


def draw_mask(draw, g, batch, queries, keys):
    kind = draw(st.sampled_from(["none", "causal", "padding", "keys", "random", "added", "one for all"]))
    if kind == "causal":
        return {"is_causal": True}
    if kind == "padding":
        lengths = torch.randint(0, keys + 1, (batch, 1, 1, 1), generator=g)
        return {"attn_mask": (torch.arange(keys) < lengths).expand(batch, 1, queries, keys)}
    if kind == "keys":
        return {"attn_mask": torch.randn(batch, 1, 1, keys, generator=g)}
    if kind == "random":
        return {"attn_mask": torch.rand(batch, 1, queries, keys, generator=g) < draw(st.sampled_from([0.02, 0.5, 0.9]))}
    if kind == "added":
        return {"attn_mask": 3 * torch.randn(1, 1, queries, keys, generator=g)}
    if kind == "one for all":
        return {"attn_mask": torch.randn(keys, queries, generator=g).T > 0}
    return {}


@KERNELS
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_it_is_that_of_the_formula(kernel, data):
    draw = data.draw
    g = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    batch, groups, shared = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    queries, keys = (draw(st.sampled_from([1, 2, 7, 8, 31, 32, 33, 64, 100])) for _ in range(2))
    width = draw(st.sampled_from([1, 3, 8, 16, 31, 32, 33, 64, 70]))
    options = draw_mask(draw, g, batch, queries, keys)
    if draw(st.booleans()):
        options["scale"] = draw(st.sampled_from([0.01, 0.5]))
    if shared > 1:
        options["enable_gqa"] = True
    q = torch.randn(batch, groups * shared, queries, width, generator=g)
    k, v = (torch.randn(batch, groups, keys, width, generator=g) for _ in range(2))
    tensors = [in_memory(draw, t) for t in (q, k, v)]
    gradient = in_memory(draw, torch.randn(q.shape, generator=g))
    before = torch.get_num_threads()
    torch.set_num_threads(draw(st.sampled_from([1, 2, 13])))
    try:
        with mock.patch.dict(os.environ, {"GUIDED_DROPOUT_KERNEL": kernel}), OwnAttention():
            found = with_gradients(F.scaled_dot_product_attention, tensors, gradient, **options)
    finally:
        torch.set_num_threads(before)
    check(found, tensors, gradient, options, 3e-6)


@pytest.mark.parametrize("size", [1e-3, 30.0, 1e4])
def test_large_scores_do_not_overflow_and_small_ones_are_kept(size):
    g = torch.Generator().manual_seed(0)
    q, k, v, gradient = (torch.randn(2, 2, 40, 16, generator=g) for _ in range(4))
    with OwnAttention():
        found = with_gradients(F.scaled_dot_product_attention, (q * size, k, v), gradient)
    want = with_gradients(attention, [t.double() for t in (q * size, k, v)], gradient)
    for ours, theirs in zip(found, want, strict=True):
        # A score's own digits are what its exponential has.
        assert (ours.double() - theirs).norm() <= 1e-6 * (1 + 4 * size) * theirs.norm() + 1e-30


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", range(3))
def test_what_is_not_finite_shows(where, bad):
    tensors = [torch.randn(2, 1, 40, 16) for _ in range(3)]
    tensors[where][1, 0, 35, 3] = bad
    with OwnAttention():
        found = with_gradients(F.scaled_dot_product_attention, tensors, torch.ones(2, 1, 40, 16))
    for t in found:
        assert t[0].isfinite().all()
    assert not found[0][1].isfinite().all()


@pytest.mark.parametrize("mask", ["bool", "added"])
def test_a_query_that_sees_no_key_gets_zero(mask):
    seen = torch.ones(2, 1, 70, 70, dtype=torch.bool)
    seen[0, :, 3] = seen[1, :, 32:] = False  # one of a block; whole blocks
    given = seen if mask == "bool" else added(seen)
    q, k, v, gradient = (torch.randn(2, 2, 70, 8) for _ in range(4))
    with OwnAttention():
        found = with_gradients(F.scaled_dot_product_attention, (q, k, v), gradient, attn_mask=given)
    assert not found[0][0, :, 3].any()
    assert not found[0][1, :, 32:].any()
    check(found, (q, k, v), gradient, {"attn_mask": given}, 3e-6)


OTHERS = {
    "float64": lambda q, k, v: ((q.double(), k.double(), v.double()), {}),
    "values of their own width": lambda q, k, v: ((q, k, v[..., :5]), {}),
    "a mask for each head": lambda q, k, v: ((q, k, v), {"attn_mask": torch.randn(2, 3, 20, 20)}),
    "a mask for each query": lambda q, k, v: ((q, k, v), {"attn_mask": torch.randn(20, 1)}),
    "a mask that is learnt": lambda q, k, v: ((q, k, v), {"attn_mask": torch.randn(20, 20).requires_grad_()}),
    "no batch": lambda q, k, v: ((q[0], k[0], v[0]), {}),
    "no keys": lambda q, k, v: ((q, k[:, :, :0], v[:, :, :0]), {}),
    "one sample's keys for all": lambda q, k, v: ((q, k[:1], v[:1]), {}),
    "dropout": lambda q, k, v: ((q, k, v), {"dropout_p": 0.5}),
}


@pytest.mark.parametrize("which", OTHERS)
def test_other_calls_are_torchs_own(which):
    q, k, v = (torch.randn(2, 3, 20, 16).requires_grad_() for _ in range(3))
    tensors, options = OTHERS[which](q, k, v)
    torch.manual_seed(0)
    want = F.scaled_dot_product_attention(*tensors, **options)
    torch.manual_seed(0)
    with OwnAttention():
        found = F.scaled_dot_product_attention(*tensors, **options)
    assert torch.equal(found, want)


def test_the_default_device_has_no_part_in_it():
    q, mask = torch.randn(1, 1, 20, 8), torch.ones(20, 20, dtype=torch.bool).tril()
    want = F.scaled_dot_product_attention(q, q, q, is_causal=True)
    with torch.device("meta"), OwnAttention():
        for options in ({"is_causal": True}, {"attn_mask": mask}, {"attn_mask": mask.float().log()}):
            found = F.scaled_dot_product_attention(q, q, q, **options)
            torch.testing.assert_close(found, want)


def test_a_mask_that_changes_between_layers_is_read_again():
    q, mask = torch.randn(1, 1, 20, 8), torch.ones(20, 20, dtype=torch.bool)
    with OwnAttention():
        F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
        mask.tril_()
        found = F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, q, q, is_causal=True))


@KERNELS
def test_the_output_may_be_changed_in_place_before_it_is_needed(kernel):
    q = torch.randn(1, 2, 20, 8, requires_grad=True)
    with mock.patch.dict(os.environ, {"GUIDED_DROPOUT_KERNEL": kernel}), OwnAttention(), torch.no_grad():
        out = F.scaled_dot_product_attention(q, q, q)
    with mock.patch.dict(os.environ, {"GUIDED_DROPOUT_KERNEL": kernel}), OwnAttention():
        changed = F.scaled_dot_product_attention(q, q, q).mul_(2)
    assert torch.equal(changed, 2 * out)


def test_a_mask_of_keys_alone_serves_any_number_of_queries():
    """As an encoder's does in its decoder, too."""
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(2, 1, 1, 50, generator=g) < 0.5
    with OwnAttention():
        for queries in (50, 3, 200):
            q, k, v = (torch.randn(2, 2, t, 8, generator=g) for t in (queries, 50, 50))
            gradient = torch.randn(q.shape, generator=g)
            found = with_gradients(F.scaled_dot_product_attention, (q, k, v), gradient, attn_mask=mask)
            check(found, (q, k, v), gradient, {"attn_mask": mask}, 3e-6)


@pytest.mark.skipif(shutil.which("cc") is None, reason="without a C compiler there is no kernel, and torch's own runs")
def test_a_second_derivative_is_refused_and_not_wrong():
    q = torch.randn(1, 1, 20, 8, requires_grad=True)
    with OwnAttention():
        out = F.scaled_dot_product_attention(q, q, q)
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@KERNELS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", MASKS)
def test_in_half_precision_it_is_that_of_float32_rounded(mask, dtype, kernel):
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, 3, t, 4, generator=g).to(dtype) for t in (5, 7, 7)]
    options = {n: o.to(dtype) if n == "attn_mask" and o.is_floating_point() else o for n, o in MASKS[mask].items()}
    gradient = torch.randn(2, 3, 5, 4, generator=g).to(dtype)
    with mock.patch.dict(os.environ, {"GUIDED_DROPOUT_KERNEL": kernel}), OwnAttention():
        found = with_gradients(F.scaled_dot_product_attention, tensors, gradient, **options)
    wide = {n: added(o).double() if n == "attn_mask" else o for n, o in options.items()}
    want = with_gradients(attention, [t.double() for t in tensors], gradient, **wide)
    for ours, theirs in zip(found, want, strict=True):
        assert ours.dtype == dtype
        assert ((ours.double() - theirs).abs() <= 0.51 * torch.finfo(dtype).eps * theirs.abs() + 2e-6).all()


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
