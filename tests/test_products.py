"""Products with a model's matrices, against the plain formula in float64."""

import os
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from guided_dropout.fisher import native
from guided_dropout.fisher.layout import Layout
from guided_dropout.fisher.products import linear, listed_times, times
from guided_dropout.fisher.rowwise import RowByRow
from guided_dropout.fisher.rules import RULES

SIZES = [1, 2, 15, 16, 17, 31, 32, 33, 47, 64, 100, 130]
in_amx = pytest.mark.skipif(not native.has_amx(), reason="this processor, or this system, has no AMX")


def check(got, x, matrix, bias):
    """Each element within what its factors' digits allow, of the sum of its terms' sizes."""
    x, matrix, bias = x.double(), matrix.double(), torch.zeros(1) if bias is None else bias.double()
    want, sizes = x @ matrix + bias, x.abs() @ matrix.abs() + bias.abs()
    allowed = 3 * 2.0**-16 + (x.shape[1] + 2) * 2.0**-24
    assert got.dtype == torch.float32
    assert ((got.double() - want).abs() <= allowed * sizes).all()


@in_amx
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_product_in_amx_is_as_exact_as_its_factors(data):
    draw = data.draw
    g = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    rows = draw(st.sampled_from([*SIZES, 700, 2500]))
    depth, width = draw(st.sampled_from([*SIZES, 512, 1100])), draw(st.sampled_from([*SIZES, 390, 800]))
    wide = torch.randn(rows, depth + 3, generator=g) * 10.0 ** draw(st.integers(-6, 6))
    x = wide[:, 2 : 2 + depth] if draw(st.booleans()) else wide[:, :depth].T.contiguous().T
    matrix = torch.randn(depth, width + 1, generator=g)[:, 1:]
    if draw(st.booleans()):
        matrix = torch.randn(width, depth + 1, generator=g)[:, 1:].T
    bias = torch.randn(2 * width, generator=g)[::2] if draw(st.booleans()) else None
    before = torch.get_num_threads()
    torch.set_num_threads(draw(st.sampled_from([1, 2, 13])))
    try:
        check(native.multiply(x, matrix, bias), x, matrix, bias)
    finally:
        torch.set_num_threads(before)


@in_amx
@pytest.mark.parametrize("sizes", [(2100, 40, 1100), (33, 1100, 2200), (1100, 600, 1100)])
@pytest.mark.parametrize("turned", [False, True])
def test_large_products_in_parts_are_too(sizes, turned):
    rows, depth, width = sizes
    torch.manual_seed(0)
    x, bias = torch.randn(rows, depth), torch.randn(width)
    matrix = torch.randn(width, depth).T if turned else torch.randn(depth, width)
    check(native.multiply(x, matrix, bias), x, matrix, bias)


@in_amx
def test_a_row_does_not_depend_on_the_others():
    """So that a sample's gradient is the same in whatever batch."""
    torch.manual_seed(0)
    x, matrix = torch.randn(2500, 1100), torch.randn(1100, 70)
    whole = native.multiply(x, matrix)
    for rows in ([3], range(1000, 1040), range(2048, 2500)):
        assert torch.equal(native.multiply(x[list(rows)], matrix), whole[list(rows)])


@pytest.mark.parametrize("kernel", ["", "portable", "off"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_listed_rows_alone_are_multiplied_and_the_others_are_zero(kernel, data):
    draw = data.draw
    g = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    rows, depth, width = (
        draw(st.sampled_from([*SIZES, 700, 2500])),
        draw(st.sampled_from(SIZES)),
        draw(st.sampled_from(SIZES)),
    )
    x = torch.randn(rows, depth + 3, generator=g)[:, 2 : 2 + depth]
    matrix = torch.randn(depth, width, generator=g) if draw(st.booleans()) else torch.randn(width, depth, generator=g).T
    listed = (torch.rand(rows, generator=g) < draw(st.sampled_from([0.0, 0.05, 0.5, 0.95, 1.0]))).nonzero()[:, 0]
    with mock.patch.dict(os.environ, {"GUIDED_DROPOUT_KERNEL": kernel}):
        ways = [listed_times(x, listed, matrix)]
        if native.has_amx():
            ways.append(native.multiply(x, matrix, listed=listed))
    others = torch.ones(rows, dtype=torch.bool).index_fill_(0, listed, False)
    for out in ways:
        check(out[listed], x[listed], matrix, None)
        assert out.shape == (rows, width)
        assert not out[others].any()


@in_amx
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_in_its_row(bad):
    x, matrix = torch.ones(300, 600), torch.ones(600, 70)
    x[40, 7] = bad
    out = native.multiply(x, matrix)
    assert not out[40].isfinite().any()
    assert (out[:40] == 600).all()
    assert (out[41:] == 600).all()


@pytest.mark.parametrize("kernel", ["", "portable", "off"])
@pytest.mark.parametrize("length", [4, 500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_whichever_way_it_goes_the_product_is_the_same(kernel, length, dtype):
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(size).to(dtype) for size in [(length, 3, 200), (90, 200), (90,)])
    rows, matrix = x[:, 1], weight.T.contiguous()
    precision = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2}[dtype]
    with mock.patch.dict(os.environ, {"GUIDED_DROPOUT_KERNEL": kernel}):
        pairs = [
            (linear(x, weight, bias), F.linear(x.double(), weight.double(), bias.double())),
            (linear(x[:, ::2], weight), F.linear(x[:, ::2].double(), weight.double())),
            (times(rows, weight.T, bias), rows.double() @ matrix.double() + bias.double()),
            (times(rows, matrix), rows.double() @ matrix.double()),
        ]
    for got, want in pairs:
        assert (got.dtype, got.shape) == (dtype, want.shape)
        assert (got.double() - want).norm() <= precision * want.norm()


@in_amx
def test_large_enough_ones_go_through_amx_unless_that_is_not_wanted():
    torch.manual_seed(0)
    weight, large, small = torch.randn(90, 200), torch.randn(96, 200), torch.randn(95, 200)
    for kernel, same in (("", [False, True]), ("portable", [True, True]), ("off", [True, True])):
        with mock.patch.dict(os.environ, {"GUIDED_DROPOUT_KERNEL": kernel}):
            assert [torch.equal(linear(x, weight), F.linear(x, weight)) for x in (large, small)] == same


@pytest.mark.parametrize("kernel", ["", "portable", "off"])
@pytest.mark.parametrize("shape", [(1,), (), (130, 90), (1, 90), (130, 1)])
def test_a_bias_is_broadcast_as_torch_does_wherever_it_may_be(kernel, shape):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(130, 200), torch.randn(90, 200), torch.randn(shape)
    with mock.patch.dict(os.environ, {"GUIDED_DROPOUT_KERNEL": kernel}):
        for got in (linear(x, weight, bias), times(x, weight.T, bias)):
            torch.testing.assert_close(got, F.linear(x, weight, bias), rtol=1e-5, atol=1e-3)


class Elsewhere(torch.Tensor):
    """A tensor whose own memory holds something else, as that of a quantised one does."""

    @classmethod
    def __torch_function__(cls, func, _, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            return func(*[a.elements if isinstance(a, cls) else a for a in args], **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_matrices_that_do_not_hold_their_elements_are_left_to_torch():
    torch.manual_seed(0)
    x, weight = torch.randn(500, 200), torch.randn(90, 200)
    wrapped = torch.zeros(90, 200).as_subclass(Elsewhere)
    wrapped.elements = weight
    for matrix in (weight.to_sparse_csr(), wrapped):
        torch.testing.assert_close(linear(x, matrix), F.linear(x, weight), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kernel", ["", "portable", "off"])
@pytest.mark.parametrize("function", [F.linear, torch.addmm])
def test_the_inputs_gradient_is_autograds(kernel, function):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(320, 96), torch.randn(130, 96), torch.randn(130)
    given = (x, weight, bias) if function is F.linear else (bias, x, weight.T.contiguous())
    wide = [t.double().requires_grad_() for t in given]
    upstream = torch.randn(320, 130)
    function(*wide).backward(upstream.double())
    rule = RULES[function]
    leaf, used = x.clone().requires_grad_(), {}
    with mock.patch.dict(os.environ, {"GUIDED_DROPOUT_KERNEL": kernel}):
        call = rule.bind(*[leaf if t is x else t for t in given])
        out = RowByRow(call, rule, Layout.even(320, 4), used.update).run()
        torch.autograd.backward(out, upstream)
    want = next(t.grad for t, narrow in zip(wide, given, strict=True) if narrow is x)
    assert (leaf.grad - want).norm() <= 1e-5 * want.norm()
    assert set(used) == {"weight", "bias"}
