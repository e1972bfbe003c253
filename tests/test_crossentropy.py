"""Cross-entropy over a vocabulary, against PyTorch's in float64."""

import os
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from guided_dropout.fisher.crossentropy import cross_entropy

KERNELS = pytest.mark.parametrize("kernel", ["", "off"])
WIDTHS = [1, 2, 15, 16, 17, 31, 33, 50, 128, 1023, 1024, 1025, 5000]


def losses_and_gradient(function, z, y, weights, made=lambda leaf: leaf * 1.0):
    """Of logits that are made of a leaf, as a model's are, and lie in memory as they may."""
    leaf = z.detach().requires_grad_()
    losses = function(made(leaf), y)
    (losses * weights).sum().backward()
    return losses.detach(), leaf.grad


IN_MEMORY = [
    lambda leaf: leaf * 1.0,
    lambda leaf: torch.cat([leaf, leaf], 1)[:, : leaf.shape[1]],
    lambda leaf: leaf.T.contiguous().T * 1.0,
]


def pytorchs(z, y):
    return F.cross_entropy(z, y, reduction="none")


@KERNELS
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_losses_and_gradients_are_pytorchs(kernel, data):
    draw = data.draw
    g = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    rows, width, size = draw(st.integers(1, 40)), draw(st.sampled_from(WIDTHS)), draw(st.sampled_from([0.1, 5.0, 60.0]))
    dtype, digits = draw(st.sampled_from([(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 5e-3)]))
    z = (torch.randn(rows, width, generator=g) * size).to(dtype)
    y, weights = torch.randint(0, width, (rows,), generator=g), torch.randn(rows, generator=g)
    with mock.patch.dict(os.environ, {"GUIDED_DROPOUT_KERNEL": kernel}):
        losses, gradient = losses_and_gradient(cross_entropy, z, y, weights, draw(st.sampled_from(IN_MEMORY)))
    want, of_want = losses_and_gradient(pytorchs, z.double(), y, weights.double())
    assert losses.dtype == torch.promote_types(dtype, torch.float32)
    assert gradient.dtype == dtype
    largest = z.double().abs().amax(1)
    # Of a logit's own digits; a gradient of rounded logits, whatever its size, is off by as much.
    assert ((losses.double() - want).abs() <= min(digits, 1e-6) * (1 + want.abs() + largest)).all()
    error = (gradient.double() - of_want).abs()
    assert (error <= digits * (1 + largest)[:, None] * weights.abs()[:, None]).all()
    assert (error[of_want == 0] == 0).all()


@KERNELS
@pytest.mark.parametrize(("least", "digits"), [(-85.0, 1e-5), (-5.0, 1e-6)])  # a logit's own decide
def test_a_small_probability_keeps_its_digits(least, digits, kernel):
    z, y = torch.linspace(least, 0.0, 2000)[None], torch.tensor([1999])
    with mock.patch.dict(os.environ, {"GUIDED_DROPOUT_KERNEL": kernel}):
        _, gradient = losses_and_gradient(cross_entropy, z, y, torch.ones(1))
    _, want = losses_and_gradient(pytorchs, z.double(), y, torch.ones(1))
    torch.testing.assert_close(gradient[:, 100:].double(), want[:, 100:], rtol=digits, atol=0)


@KERNELS
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("column", [0, 33, 99])
def test_a_row_that_is_not_finite_shows_and_others_do_not(bad, column, kernel):
    z = torch.randn(3, 100)
    z[1, column] = bad
    with mock.patch.dict(os.environ, {"GUIDED_DROPOUT_KERNEL": kernel}):
        losses = cross_entropy(z.clone(), torch.tensor([5, 6, 7]))
    assert losses.isfinite().tolist() == [True, False, True]


@KERNELS
def test_what_a_model_rules_out_has_no_gradient(kernel):
    z = torch.randn(4, 70)
    z[:, ::3] = -torch.inf
    y = torch.tensor([1, 2, 4, 68])
    with mock.patch.dict(os.environ, {"GUIDED_DROPOUT_KERNEL": kernel}):
        losses, gradient = losses_and_gradient(cross_entropy, z, y, torch.ones(4))
    want, of_want = losses_and_gradient(pytorchs, z.double(), y, torch.ones(4))
    torch.testing.assert_close(losses.double(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), of_want, rtol=1e-5, atol=1e-7)
    assert not gradient[:, ::3].any()


@KERNELS
def test_no_rows_have_no_losses(kernel):
    with mock.patch.dict(os.environ, {"GUIDED_DROPOUT_KERNEL": kernel}):
        losses, gradient = losses_and_gradient(cross_entropy, torch.ones(0, 7), torch.zeros(0, dtype=torch.int64), 1.0)
    assert losses.shape == (0,)
    assert gradient.shape == (0, 7)
