"""What holds of the Triton kernels, on a GPU or in Triton's interpreter; `test_triton_kernel` runs it in a process of
its own, since Triton takes up the interpreter for good when it is first imported.
"""

from itertools import accumulate, pairwise

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st

from guided_dropout.fisher.triton_kernel import CONFIGS, INTERPRETED, square_accumulate, square_sums, supports

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = [triton.Config({"BLOCK_M": m, "BLOCK_N": n}) for m, n in ((16, 16), (32, 16), (16, 64))]


def whole_numbers(*shape, dtype, seed, largest=3):
    """Small enough that float32 holds every sum exactly, so that no tolerance can hide a mistake."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=g).to(DEVICE, dtype)


def sliced(x):
    """The same numbers as a part of a larger matrix that holds NaN beside them."""
    around = x.new_full((x.shape[0] + 3, x.shape[1] + 5), torch.nan)
    around[1:-2, 2:-3] = x
    return around[1:-2, 2:-3]


def gradients(left, right, offsets):
    """[B, m, n] float64, the obvious way."""
    pairs = [(left[s:e].double(), right[s:e].double()) for s, e in pairwise(offsets)]
    return torch.stack([torch.einsum("tm,tn->mn", x, y) for x, y in pairs])


batches = given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    lengths=st.lists(st.sampled_from([0, 1, 16, 32]) | st.integers(0, 50), min_size=1, max_size=4),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    splits=st.sampled_from([None, 1, 2, 7]),
    config=st.sampled_from(SMALL if INTERPRETED else CONFIGS),
    seed=st.integers(0, 1000),
)


@settings(max_examples=30, deadline=None)
@batches
def test_adds_the_squares_of_each_samples_sum(m, n, lengths, dtypes, splits, config, seed):
    offsets = (0, *accumulate(lengths))
    left = whole_numbers(offsets[-1], m, dtype=dtypes[0], seed=seed)
    right = whole_numbers(offsets[-1], n, dtype=dtypes[1], seed=seed + 1)
    before = whole_numbers(m, n, dtype=torch.float32, seed=seed + 2)
    total = sliced(before)
    square_accumulate(total, sliced(left), sliced(right), offsets, splits=splits, config=config)
    assert torch.equal(total, (before + gradients(left, right, offsets).square().sum(0)).float())
    around = total._base
    assert around is not None
    assert around.isnan().sum() == around.numel() - total.numel()


@settings(max_examples=15, deadline=None)
@batches
def test_sums_the_squares_of_each_sample(m, n, lengths, dtypes, splits, config, seed):
    offsets = (0, *accumulate(lengths))
    left = whole_numbers(offsets[-1], m, dtype=dtypes[0], seed=seed, largest=1)
    right = whole_numbers(offsets[-1], n, dtype=dtypes[1], seed=seed + 1, largest=1)
    found = square_sums(sliced(left), sliced(right), offsets, splits=splits, config=config)
    assert found.dtype == torch.float64
    assert torch.equal(found, gradients(left, right, offsets).square().sum((1, 2)))


@pytest.mark.parametrize("precision", ["tf32x3", "ieee", "bf16x6"])
def test_float32_is_as_good_as_float32_with_tiles_of_its_own_choice(precision):
    g = torch.Generator().manual_seed(0)
    left, right = (torch.randn(200, d, generator=g).to(DEVICE) for d in (45, 33))
    offsets = (0, 60, 61, 61, 200)
    want = gradients(left, right, offsets).square()
    total = torch.zeros(45, 33, device=DEVICE)
    for _ in range(2):
        square_accumulate(total, left, right, offsets, precision=precision)
    assert (total - 2 * want.sum(0)).norm() <= 2e-6 * total.norm()
    torch.testing.assert_close(
        square_sums(left, right, offsets, precision=precision), want.sum((1, 2)), rtol=2e-6, atol=0
    )


def test_every_tile_of_a_tall_matrix_is_visited_once():
    """Tiles are visited in bands of eight rows of tiles; here the last band is lower."""
    config = (SMALL if INTERPRETED else CONFIGS)[0]
    size = config.kwargs["BLOCK_M"]
    left, right = (whole_numbers(7, d, dtype=torch.float32, seed=d) for d in (size * 9 + 5, size * 2 + 3))
    total = torch.zeros(left.shape[1], right.shape[1], device=DEVICE)
    square_accumulate(total, left, right, (0, 4, 7), config=config)
    assert torch.equal(total, gradients(left, right, (0, 4, 7)).square().sum(0).float())


def test_totals_of_more_elements_than_32_bits_count():
    """On a CPU only a few of its pages are ever touched; a GPU's memory holds all of it."""
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 9 << 30:
        pytest.skip("less than 9 GiB are free")
    total = torch.empty((2 << 30) + 5, device=DEVICE).as_strided((3, 5), (1 << 30, 1)).zero_()
    left, right = (whole_numbers(9, d, dtype=torch.float32, seed=d) for d in (3, 5))
    square_accumulate(total, left, right, (0, 4, 9), config=(SMALL if INTERPRETED else CONFIGS)[0])
    assert torch.equal(total, gradients(left, right, (0, 4, 9)).square().sum(0).float())


def test_columns_that_are_not_contiguous_and_rows_that_are_one():
    left = whole_numbers(4, 12, dtype=torch.float32, seed=0).T
    right = whole_numbers(1, 6, dtype=torch.float32, seed=1).expand(12, 6)
    total = torch.zeros(4, 6, device=DEVICE)
    with torch.device("meta"):  # whatever device the caller has made the default
        square_accumulate(total, left, right, (0, 5, 12))
    assert torch.equal(total, gradients(left, right, (0, 5, 12)).square().sum(0).float())


def test_says_what_it_takes():
    half, single, double = (torch.zeros(2, 2, dtype=d, device=DEVICE) for d in (DTYPES[1], DTYPES[0], torch.float64))
    assert supports(single, half, single)
    assert supports(None, half, half)
    assert not supports(double, single, single)
    assert not supports(single, double, single)
    assert not supports(torch.zeros(3, 2, device=DEVICE).T, half, half)
