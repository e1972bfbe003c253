"""Random numbers of dropout on a CPU: as likely as asked, independent, everywhere, and torch's again afterwards."""

import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from guided_dropout.masks import bernoulli, quick_masks

SHAPE = (3, 5, 7)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(p: float = 0.3) -> torch.Tensor:
    return torch.empty(SHAPE).bernoulli_(p, generator=seeded(0))


TORCHS = drawn()
OURS = bernoulli(torch.empty(SHAPE), 0.3, generator=seeded(0))


@given(st.floats(0.0, 1.0) | st.floats(0.0, 0.01) | st.sampled_from([1 / 256, 1e-5, 0.1, 0.9, 1 - 1e-5]), st.integers())
def test_ones_are_as_likely_as_asked(p: float, seed: int) -> None:
    n = 100_000
    ones = bernoulli(torch.full((n,), torch.nan), p, generator=seeded(seed % 2**63))
    assert ((ones == 0) | (ones == 1)).all()
    # Poisson's tails, where a binomial is rare, are heavier than a normal's: the last term.
    assert abs(float(ones.double().sum()) - n * p) <= 7 * (n * p * (1 - p)) ** 0.5 + 12


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.003])
def test_numbers_do_not_depend_on_one_another(p: float) -> None:
    """Pearson's statistic of two that stand near one another: they share a word, or are drawn one after another."""
    n = 2_000_000
    ones = bernoulli(torch.empty(n, dtype=torch.float64), p, generator=seeded(1)) - p
    for lag in (*range(1, 10), 64, 312, 624, 1248, 2496):
        z = float((ones[:-lag] * ones[lag:]).sum()) / (p * (1 - p) * (n - lag) ** 0.5)
        assert abs(z) < 5, lag


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.bool, torch.int32])
def test_any_tensor_is_filled(dtype: torch.dtype) -> None:
    torch.testing.assert_close(bernoulli(torch.empty(SHAPE, dtype=dtype), 0.3, generator=seeded(0)), OURS.to(dtype))


def test_strides_do_not_matter_and_gaps_are_left_alone() -> None:
    wide = torch.full((3, 5, 14), 9.0)
    assert bernoulli(wide[..., ::2], 0.3, generator=seeded(0)).data_ptr() == wide.data_ptr()
    torch.testing.assert_close(wide[..., ::2], OURS)
    assert (wide[..., 1::2] == 9).all()


def test_nothing_and_one_are_filled() -> None:
    assert bernoulli(torch.empty(0, 3), 0.3).shape == (0, 3)
    assert bernoulli(torch.tensor(7.0), 1.0) == 1.0


def test_a_wrong_probability_is_refused_as_torch_does() -> None:
    for wrong in (-0.1, 1.5, float("nan")):
        for fill in (torch.Tensor.bernoulli_, bernoulli):
            with pytest.raises(RuntimeError, match=r"bernoulli_ expects p to be in \[0, 1\]"):
                fill(torch.empty(3), wrong)


def test_torchs_own_is_back_after_the_last_of_several_blocks() -> None:
    with quick_masks():
        with quick_masks():
            assert torch.equal(drawn(), OURS)
        assert torch.equal(drawn(), OURS)
    assert torch.equal(drawn(), TORCHS)
    with pytest.raises(KeyError), quick_masks():
        raise KeyError
    assert torch.equal(drawn(), TORCHS)


def test_blocks_of_threads_may_overlap() -> None:
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        with quick_masks():
            inside.set()
            done.wait(60)

    thread = threading.Thread(target=other)
    with quick_masks():
        thread.start()
        assert inside.wait(60)
    assert torch.equal(drawn(), OURS)
    done.set()
    thread.join()
    assert torch.equal(drawn(), TORCHS)


def attention(p: float) -> torch.Tensor:
    zeros, values = torch.zeros(8, 4, 64, 16), torch.eye(64).expand(8, 4, 64, 64)
    return F.scaled_dot_product_attention(zeros, zeros, values, dropout_p=p) * 64


@pytest.mark.parametrize("dropout", [lambda p: F.dropout(torch.ones(8, 4, 64, 64), p), attention])
def test_dropout_keeps_its_rate_mean_and_gradient(dropout: Callable[[float], torch.Tensor]) -> None:
    torch.manual_seed(0)
    theirs = dropout(0.25)
    torch.manual_seed(0)
    with quick_masks():
        ours = dropout(0.25)
    assert not torch.equal(ours, theirs)
    for out in (ours, theirs):
        assert ((out == 0) | ((out - 4 / 3).abs() < 1e-5)).all()
        assert abs(float((out == 0).double().mean()) - 0.25) < 5 * (0.25 * 0.75 / out.numel()) ** 0.5
    x = torch.ones(1000, requires_grad=True)
    with quick_masks():
        out = F.dropout(x, 0.25)
        out.sum().backward()
    torch.testing.assert_close(x.grad, out.detach())


@pytest.mark.parametrize("p", [0.5, 0.003])
def test_a_seed_gives_the_same_numbers_again(p: float) -> None:
    first, again, other = (bernoulli(torch.empty(10_000), p, generator=seeded(n)) for n in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_numbers_do_not_depend_on_the_number_of_threads() -> None:
    threads = torch.get_num_threads()
    try:
        found = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(bernoulli(torch.empty(300_001), 0.9, generator=seeded(3)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
