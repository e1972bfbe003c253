"""Squares of per-sample gradients, whatever they are computed by, against the plain formula in float64."""

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from guided_dropout.fisher import kernels
from guided_dropout.fisher.layout import Layout
from guided_dropout.fisher.rowwise import RowByRow, rows_with_gradient
from guided_dropout.fisher.rules import RULES
from guided_dropout.fisher.squares import Outer, Rows, Sums, add_squares

# Not whether the kernel was built: where it can be and was not, its tests fail.
HAS_COMPILER = sys.platform != "win32" and shutil.which(os.environ.get("CC", "cc").split()[0]) is not None


def dense(use, shape):
    """A use's gradient of each sample, [B, *shape] float64, by loops."""
    if isinstance(use, Sums):
        return use.grads.double()
    layout = use.layout
    out = torch.zeros(layout.num_samples, *shape, dtype=torch.float64)
    for row, b in zip(layout.row_numbers(torch.device("cpu")), layout.owners(torch.device("cpu")), strict=True):
        if isinstance(use, Outer):
            out[b] += torch.outer(use.left[row].double(), use.right[row].double())
        else:
            out[b, use.ids[row]] += use.grads[row].double()
    return out


def check(uses, shape, num_samples, *, dtype, rtol):
    gradients = sum(dense(u, shape) for u in uses)
    before = torch.rand(shape, dtype=dtype)
    total, sums = before.clone(), torch.ones(num_samples, dtype=torch.float64)
    add_squares(total, uses, sums)
    assert (total - before - (gradients**2).sum(0)).norm() <= rtol * (1 + (gradients**2).sum(0).norm())
    norms = (gradients**2).flatten(1).sum(1)
    torch.testing.assert_close(sums - 1, norms, rtol=rtol, atol=rtol * (1 + norms.max().item()))
    sums.fill_(1)
    add_squares(None, uses, sums)
    torch.testing.assert_close(sums - 1, norms, rtol=10 * rtol, atol=10 * rtol * (1 + norms.max().item()))


@contextlib.contextmanager
def threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def random_layout(draw, g, num_samples, num_rows):
    kind = draw(st.sampled_from(["even", "ragged", "scattered", "idle"]))
    if kind == "even":
        return Layout.even(num_rows, num_samples)
    owners = torch.randint(0, num_samples, (num_rows,), generator=g)
    if kind == "ragged":
        return Layout((0, *torch.bincount(owners, minlength=num_samples).cumsum(0).tolist()))
    if kind == "scattered":
        return Layout.of_owners(owners, num_samples)
    return Layout.even(num_rows, num_samples).only((torch.rand(num_rows, generator=g) < 0.5).nonzero()[:, 0])


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_products_lookups_and_both_equal_the_plain_formula(data):
    draw = data.draw
    g = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    num_samples, rows = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    m, n = draw(st.sampled_from([1, 3, 12, 13, 40])), draw(st.sampled_from([1, 5, 32, 33, 70]))
    num_rows = rows * num_samples

    def outer():
        wide = torch.randn(num_rows, n + 2, generator=g, dtype=dtype)
        left = (
            torch.randn(m, num_rows, generator=g, dtype=dtype).T if draw(st.booleans()) else wide.new_ones(num_rows, m)
        )
        return Outer(left, wide[:, 1:-1], random_layout(draw, g, num_samples, num_rows))

    def lookup():
        ids = torch.randint(0, m, (num_rows,), generator=g)
        return Rows(ids, torch.randn(num_rows, n, generator=g, dtype=dtype), Layout.even(num_rows, num_samples))

    uses = [outer() for _ in range(draw(st.integers(0, 2)))] + [lookup() for _ in range(draw(st.integers(0, 2)))]
    uses = uses or [outer()]
    check(uses, (m, n), num_samples, dtype=dtype, rtol=1e-5 if dtype == torch.float32 else 1e-12)


def test_vectors_sum_their_uses_before_squaring():
    a, b = torch.randn(3, 7), torch.randn(3, 7)
    check([Sums(a), Sums(b)], (7,), 3, dtype=torch.float32, rtol=1e-5)


def test_a_lookup_that_cancels_a_product_leaves_no_square_below_zero():
    """What is left of either is rounding, of either sign; a sum of squares has one, and rankings refuse the other."""
    g = torch.Generator().manual_seed(0)
    left, right = torch.randn(160, 64, generator=g), torch.randn(160, 96, generator=g)
    product = left.double().T @ right.double()
    uses = [
        Outer(left, right, Layout.even(160, 1)),
        Rows(torch.arange(64), -product.float(), Layout.even(64, 1)),
    ]
    total = torch.zeros(64, 96)
    add_squares(total, uses)
    assert total.min() >= 0
    assert total.max() <= 1e-4 * product.square().max()


@pytest.mark.parametrize("kept_share", [0.1, 0.5])
def test_listed_rows_by_the_thousand_add_up(kept_share):
    torch.manual_seed(0)
    rows, weight, bias = torch.randn(6000, 3), torch.randn(3, 5), torch.randn(5)
    kept = (torch.rand(6000) < kept_share).nonzero()[:, 0]
    layout = Layout.even(6000, 4).only(kept)
    want = torch.stack([rows[kept[kept // 1500 == b]].double().sum(0) for b in range(4)])
    torch.testing.assert_close(layout.sum_rows(rows).double(), want, rtol=1e-5, atol=1e-4)

    # The same through a linear layer's own backward, in which rows without a gradient have no part.
    rule, taken = RULES[F.linear], {}
    call = rule.bind(rows.requires_grad_(), weight.T.requires_grad_(), bias)
    gradient = torch.randn(6000, 5).index_fill_(0, (torch.rand(6000) >= kept_share).nonzero()[:, 0], 0.0)
    RowByRow(call, rule, Layout.even(6000, 4), taken.update).run().backward(gradient)
    torch.testing.assert_close(rows.grad, gradient @ weight.T)
    square = torch.zeros(5, 3)
    add_squares(square, [taken["weight"]])
    torch.testing.assert_close(taken["bias"].grads, gradient.unflatten(0, (4, 1500)).sum(1))
    whole = [gradient[b : b + 1500].T @ rows.detach()[b : b + 1500] for b in range(0, 6000, 1500)]
    torch.testing.assert_close(square, torch.stack(whole).square().sum(0), rtol=1e-4, atol=1e-3)


def test_where_there_is_a_compiler_the_kernel_is_what_is_used():
    """So that the tests below are of the kernel there, and of the torch path where there is none."""
    used = kernels.backend(torch.device("cpu"), torch.float32)
    assert used in (("native", "amx") if HAS_COMPILER else ("torch",))


@pytest.mark.parametrize("number", [1, 2, 5])
@pytest.mark.parametrize(
    ("rows", "m", "n"), [((300, 0, 1), 40, 70), ((7,), 12, 32), ((5, 6), 200, 700), ((3, 600), 13, 31)]
)
def test_products_at_sizes_of_several_blocks(rows, m, n, number):
    torch.manual_seed(0)
    left, right = torch.randn(sum(rows), m), torch.randn(sum(rows), n)
    layout = Layout((0, *torch.tensor(rows).cumsum(0).tolist()))
    total, sums = torch.zeros(m, n), torch.zeros(len(rows), dtype=torch.float64)
    by_gram = torch.zeros_like(sums)
    with threads(number):
        kernels.square_accumulate(total, sums, left, right, layout)
        kernels.gram_sums(by_gram, left, right, layout)
    want = [(left[s].double().T @ right[s].double()) ** 2 for _, s in layout.spans()]
    torch.testing.assert_close(total.double(), sum(want), rtol=1e-5, atol=1e-4)
    filled = [b for b, _ in layout.spans()]
    for found in (sums, by_gram):
        torch.testing.assert_close(found[filled], torch.stack([w.sum() for w in want]), rtol=1e-5, atol=0)
        assert found.count_nonzero() == len(filled)


@given(data=st.data())
def test_gram_sums_equal_the_products_whatever_the_rows(data):
    draw = data.draw
    g = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    num_samples = draw(st.integers(1, 5))
    num_rows = num_samples * draw(st.integers(1, 15))
    m, n = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))  # the torch path takes float64 everywhere
    wide = torch.randn(num_rows, m + n, generator=g, dtype=dtype)
    left, right = (wide[:, :m], wide[:, m:]) if draw(st.booleans()) else (wide[:, :m].T.contiguous().T, wide[:, m:])
    layout, sums = random_layout(draw, g, num_samples, num_rows), torch.zeros(num_samples, dtype=torch.float64)
    kernels.gram_sums(sums, left, right, layout)
    want = torch.zeros_like(sums)
    for b, span in layout.spans():
        want[b] = (layout.take(left, span).double().T @ layout.take(right, span).double()).square().sum()
    precise = dtype == torch.float64
    torch.testing.assert_close(sums, want, rtol=1e-10 if precise else 1e-4, atol=1e-10 if precise else 1e-4)


@pytest.mark.parametrize("kernel", ["", "portable", "off"])
def test_the_default_device_is_that_of_other_tensors(kernel):
    left, right, layout = torch.randn(40, 8), torch.randn(40, 9), Layout.even(40, 4)
    left[10:30] = 0
    sums = torch.zeros(4, dtype=torch.float64)
    with mock.patch.dict(os.environ, {"GUIDED_DROPOUT_KERNEL": kernel}), torch.device("meta"):
        kernels.gram_sums(sums, left, right, layout)
        kept = rows_with_gradient(left)
    want = (left.double().unflatten(0, (4, 10)).mT @ right.double().unflatten(0, (4, 10))).square().sum((1, 2))
    torch.testing.assert_close(sums, want, rtol=1e-4, atol=0)
    assert kept is not None
    assert kept.tolist() == [*range(10), *range(30, 40)]


@pytest.mark.parametrize("kernel", ["", "off"])
@pytest.mark.parametrize("apart", [1e-2, 1e-3, 1e-4, 0.0])
@pytest.mark.parametrize("even", [True, False])
def test_gram_sums_that_cancel_are_found_by_products(apart, kernel, even):
    """Rows of the left add up to zero, as those of attention's keys do, and those on the right are nearly the same."""
    g = torch.Generator().manual_seed(0)
    lengths = [64] * 8 if even else [64, 3, 0, 40, 64]
    left = [part - part.mean(0) for part in (torch.randn(n, 256, generator=g) for n in lengths)]
    one = torch.randn(256, generator=g)
    right = [one + apart * torch.randn(n, 256, generator=g) for n in lengths]
    offsets = (0, *itertools.accumulate(lengths))
    layout = Layout.even(offsets[-1], len(lengths)) if even else Layout(offsets)
    sums = torch.zeros(len(lengths), dtype=torch.float64)
    with mock.patch.dict(os.environ, {"GUIDED_DROPOUT_KERNEL": kernel}):
        kernels.gram_sums(sums, torch.cat(left), torch.cat(right), layout)
    want = torch.stack([(a.double().T @ b.double()).square().sum() for a, b in zip(left, right, strict=True)])
    assert (sums >= 0).all()
    torch.testing.assert_close(sums, want, rtol=2e-4, atol=0)


@pytest.mark.parametrize("kernel", ["", "portable", "off"])
@pytest.mark.parametrize(("m", "n"), [(0, 40), (40, 0), (0, 0)])
def test_matrices_without_elements_have_no_squares(m, n, kernel):
    sums = torch.zeros(2, dtype=torch.float64)
    with mock.patch.dict(os.environ, {"GUIDED_DROPOUT_KERNEL": kernel}):
        for total in (torch.zeros(m, n), None):
            kernels.square_accumulate(total, sums, torch.ones(64, m), torch.ones(64, n), Layout.even(64, 2))
    assert sums.tolist() == [0, 0]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("kernel", ["", "portable", "off"])
def test_products_are_as_exact_as_their_factors_in_each_kernel(kernel, data):
    draw = data.draw
    g = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    num_samples, rows = draw(st.integers(1, 4)), draw(st.sampled_from([20, 32, 45, 64, 130]))
    m, n = draw(st.sampled_from([31, 64, 100, 600])), draw(st.sampled_from([30, 64, 131, 900]))
    wide = (torch.randn(num_samples * rows, m + n + 3, generator=g) * 10.0 ** draw(st.integers(-6, 6))).to(dtype)
    left = wide[:, :m].T.contiguous().T if draw(st.booleans()) else wide[:, :m]
    right, layout = wide[:, m : m + n], random_layout(draw, g, num_samples, num_samples * rows)
    before = torch.rand(m, n, generator=g) * wide.double().square().mean().square().float()
    total, sums = before.clone(), torch.zeros(num_samples, dtype=torch.float64)
    with mock.patch.dict(os.environ, {"GUIDED_DROPOUT_KERNEL": kernel}), threads(draw(st.sampled_from([1, 2, 13]))):
        in_pieces = kernels.backend(left.device, dtype) == "amx" and dtype == torch.float32
        kernels.square_accumulate(total, sums, left, right, layout)
    want, allowed = before.double(), 1e-6 * before.double()
    for b, span in layout.spans():
        a, c = layout.take(left, span).double(), layout.take(right, span).double()
        product, sizes = a.T @ c, a.abs().T @ c.abs()
        error = (len(a) * 2.0**-24 + (3 * 2.0**-16 if in_pieces else 0)) * sizes  # of the sum of a product's terms
        square, of_square = product.square(), 2 * product.abs() * error + error.square()
        want, allowed = want + square, allowed + of_square + 2.0**-22 * (want + square)
        assert abs(sums[b] - square.sum()) <= of_square.sum() + 2.0**-17 * square.sum()
    assert ((total.double() - want).abs() <= allowed).all()


@pytest.mark.parametrize("kernel", ["", "portable", "off"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_not_lost(bad, kernel):
    left, right = torch.ones(64, 64), torch.ones(64, 100)
    left[40, 7] = bad
    total, sums = torch.zeros(64, 100), torch.zeros(2, dtype=torch.float64)
    with mock.patch.dict(os.environ, {"GUIDED_DROPOUT_KERNEL": kernel}):
        kernels.square_accumulate(total, sums, left, right, Layout((0, 32, 64)))
    assert not total[7].isfinite().any()
    assert (total[:7] == 2 * 32**2).all()
    assert (total[8:] == 2 * 32**2).all()
    assert sums.isfinite().tolist() == [True, False]


PRODUCT = """
import torch
from guided_dropout.fisher import kernels
from guided_dropout.fisher.layout import Layout
torch.manual_seed(0)
left, right, total = torch.randn(12, 20), torch.randn(12, 30), torch.zeros(20, 30)
kernels.square_accumulate(total, None, left, right, Layout((0, 5, 12)))
want = (left[:5].double().T @ right[:5].double()) ** 2 + (left[5:].double().T @ right[5:].double()) ** 2
print(kernels.backend(left.device, left.dtype), bool((total - want).norm() < 1e-6 * want.norm()))
"""


@pytest.mark.parametrize("without", [{"GUIDED_DROPOUT_KERNEL": "off"}, {"CC": "/nowhere/cc"}])
def test_without_the_kernel_results_are_the_same(without):
    done = subprocess.run(
        [sys.executable, "-c", PRODUCT], env={**os.environ, **without}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["torch", "True"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [10, 40])
def test_in_half_precision_nothing_is_rounded_but_the_factors(dtype, rows):
    torch.manual_seed(0)
    left, right = torch.randn(4 * rows, 20).to(dtype), torch.randn(4 * rows, 30).to(dtype)
    layout = Layout.even(4 * rows, 4)
    total, sums = torch.zeros(20, 30), torch.zeros(4, dtype=torch.float64)
    kernels.square_accumulate(total, sums, left, right, layout)
    want = sum((left[s].double().T @ right[s].double()) ** 2 for _, s in layout.spans())
    assert (total - want).norm() < 1e-6 * want.norm()
    assert sums.sum() == pytest.approx(want.sum().item(), rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_products_are_squared_in_float32(dtype, data):
    draw = data.draw
    g = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    num_samples, rows = draw(st.integers(1, 5)), draw(st.sampled_from([1, 9, 40, 90]))
    m, n = draw(st.sampled_from([1, 13, 40])), draw(st.sampled_from([1, 33, 70]))
    wide = torch.randn(num_samples * rows, m + n, generator=g).to(dtype)
    left = wide[:, :m].T.contiguous().T if draw(st.booleans()) else wide[:, :m]
    check_half(left, wide[:, m:], random_layout(draw, g, num_samples, num_samples * rows))


def check_half(left, right, layout):
    total, sums, alone = torch.ones(left.shape[1], right.shape[1]), *torch.zeros(2, layout.num_samples).double()
    kernels.square_accumulate(total, sums, left, right, layout)
    kernels.square_accumulate(None, alone, left, right, layout)
    want = torch.zeros(layout.num_samples, *total.shape, dtype=torch.float64)
    for b, span in layout.spans():
        want[b] = (layout.take(left, span).double().T @ layout.take(right, span).double()) ** 2
    torch.testing.assert_close(total.double() - 1, want.sum(0), rtol=1e-4, atol=1e-4 * (1 + want.max().item()))
    for found in (sums, alone):
        torch.testing.assert_close(found, want.sum((1, 2)), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rows", [(40, 40, 40), (64, 0, 33)])
@pytest.mark.parametrize(("m", "n"), [(3000, 700), (30, 70_000)])
def test_half_precision_products_of_several_blocks(rows, m, n):
    torch.manual_seed(0)
    left, right = torch.randn(sum(rows), m).bfloat16(), torch.randn(sum(rows), n).bfloat16()
    even = len(set(rows)) == 1
    check_half(left, right, Layout.even(sum(rows), len(rows)) if even else Layout((0, 64, 64, 97)))
