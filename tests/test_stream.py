"""Batches of like lengths: each sample once, within the budget, little padding, in constant memory, the same sums."""

import copy
import itertools
import random

import pytest
import torch
from families import language_model
from hypothesis import given, settings
from hypothesis import strategies as st

from guided_dropout import estimate_fisher, find_sites
from guided_dropout.errors import DataError
from guided_dropout.fisher.ranking import RankingTest
from guided_dropout.fisher.stream import LOOK_AHEAD, MOST_SAMPLES, Item, Stream, batches
from guided_dropout.objectives import Objective


def draw_samples(lengths, *, seed=0, vocab=64):
    g = torch.Generator().manual_seed(seed)
    return [{"input_ids": (ids := torch.randint(5, vocab, (n,), generator=g)), "labels": ids} for n in lengths]


def pairs(*lengths):
    """Samples of a sequence to sequence model: (input length, labels' length) each."""
    return [{"input_ids": [5] * n, "labels": [5] * m} for n, m in lengths]


def items(lengths):
    return [Item(i, {}, pair) for i, pair in enumerate(lengths)]


def padded(batch):
    return len(batch) * (max(i.lengths[0] for i in batch) + max(i.lengths[1] for i in batch))


def padding_share(lengths, **sizes):
    cut = list(batches(items(lengths), **sizes))
    whole = sum(map(padded, cut))
    return 1 - sum(sum(pair) for pair in lengths) / whole


def oracle(model, family, samples):
    """One sample after the other, plain autograd in float64: the mean square of each parameter's derivative."""
    model = copy.deepcopy(model).double().eval()
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for s in samples:
        model.zero_grad()
        ids, labels = s["input_ids"][None], s["labels"]
        logits = model(input_ids=ids, **({"labels": labels[None]} if family == "bart" else {})).logits[0]
        if family == "gpt2":
            logits, labels = logits[:-1], labels[1:]
        torch.nn.functional.cross_entropy(logits, labels).backward()
        for n, p in model.named_parameters():
            if p.grad is not None:
                total[n] += p.grad**2
    return {n: (t / len(samples)).mean().item() for n, t in total.items()}


@settings(max_examples=15, deadline=None)
@given(
    family=st.sampled_from(["bert", "gpt2", "bart"]),
    lengths=st.lists(st.integers(2, 24), min_size=1, max_size=9),
    budget=st.one_of(st.none(), st.integers(1, 120)),
    batch_size=st.integers(1, 10),
)
def test_the_result_is_that_of_one_sample_at_a_time(family, lengths, budget, batch_size):
    model = language_model(family).double()
    samples = draw_samples(lengths)
    profile = estimate_fisher(model, iter(samples), batch_size=batch_size, tokens_per_batch=budget)
    assert profile.num_samples == len(samples)
    expected = oracle(model, family, samples)
    assert profile.tensor_means == pytest.approx(expected, rel=1e-11, abs=1e-14 * max(expected.values()))


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 300), st.integers(0, 50)), max_size=600),
    budget=st.one_of(st.none(), st.integers(1, 2000)),
    batch_size=st.integers(1, 700),
)
def test_each_sample_stands_in_one_batch_and_no_batch_is_too_large(lengths, budget, batch_size):
    drawn = items(lengths)
    cut = list(batches(iter(drawn), batch_size=batch_size, tokens_per_batch=budget))
    assert sorted(item.index for batch in cut for item in batch) == list(range(len(drawn)))
    for batch in cut:
        if budget is None:
            assert len(batch) <= min(batch_size, MOST_SAMPLES)
        else:
            assert len(batch) == 1 or padded(batch) <= budget
            assert len(batch) <= MOST_SAMPLES
    assert cut == list(batches(iter(drawn), batch_size=batch_size, tokens_per_batch=budget))


@settings(max_examples=100, deadline=None)
@given(
    drawn=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 4), st.booleans()), max_size=60),
    budget=st.one_of(st.none(), st.integers(1, 60)),
    batch_size=st.integers(1, 9),
)
def test_in_order_a_batch_ends_where_the_next_sample_has_no_place_in_it(drawn, budget, batch_size):
    stream = [Item(i, {}, (n, m), strict) for i, (n, m, strict) in enumerate(drawn)]

    def fits(batch):
        of_one_length = len({i.lengths for i in batch}) == 1
        within = len(batch) <= batch_size if budget is None else padded(batch) <= budget
        return within and (of_one_length or not any(i.unpadded for i in batch))

    cut = list(batches(iter(stream), batch_size=batch_size, tokens_per_batch=budget, in_order=True))
    assert [item for batch in cut for item in batch] == stream
    assert all(len(batch) == 1 or fits(batch) for batch in cut)
    assert not any(fits([*batch, following[0]]) for batch, following in itertools.pairwise(cut))


def test_a_rule_stops_on_the_first_samples_of_the_stream_whatever_their_lengths():
    model, rng = language_model("bert"), random.Random(0)
    samples = draw_samples([rng.randint(2, 20) for _ in range(300)])
    samples[1::40] = [{"input_ids": [5, 6], "labels": [-100, -100]}] * 8
    sites = {s.path: s.parameters for s in find_sites(model) if not s.in_head}
    rule = RankingTest(sites, tolerance=5.0)
    found = estimate_fisher(model, iter(samples), tokens_per_batch=1000, until_ranked=rule)
    assert found.num_samples < 200
    first = estimate_fisher(model, samples[: found.num_samples + found.num_skipped])
    assert first.num_samples == found.num_samples
    means = {name: mean for name, mean in first.tensor_means.items() if name not in found.noise}
    assert {name: found.tensor_means[name] for name in means} == pytest.approx(means, rel=1e-4)


def test_padding_costs_next_to_nothing():
    rng = random.Random(0)
    mixed = [(min(512, max(4, round(rng.lognormvariate(4, 0.8)))), 0) for _ in range(20_000)]
    assert padding_share(mixed, tokens_per_batch=4096) < 0.06
    assert padding_share(mixed, batch_size=8) < 0.06
    two = [(rng.randint(10, 512), rng.randint(5, 128)) for _ in range(20_000)]  # neither says anything of the other
    assert padding_share(two, tokens_per_batch=8192) < 0.15


def test_the_longest_come_first_and_then_all_lengths_are_mixed():
    rng = random.Random(0)
    cut = list(batches(items([(rng.randint(4, 400), 0) for _ in range(512)]), batch_size=8))
    longest = [max(i.lengths[0] for i in batch) for batch in cut]
    assert longest[0] == max(longest)
    halves = [sum(longest[1:32]) / 31, sum(longest[32:]) / 32]
    assert max(halves) < 1.5 * min(halves)


@pytest.mark.parametrize("sizes", [{"batch_size": 2}, {"tokens_per_batch": 20}])
def test_no_more_is_read_ahead_than_a_few_batches(sizes):
    model, read, ahead = language_model("bert"), 0, []

    def endless():
        nonlocal read
        for sample in draw_samples([10] * (2 * 2 * LOOK_AHEAD)):
            read += 1
            yield sample

    estimate_fisher(model, endless(), progress=lambda done: ahead.append(read - done), **sizes)
    assert max(ahead) <= 2 * LOOK_AHEAD
    assert len(ahead) == 2 * LOOK_AHEAD


def test_a_budget_counts_the_decoder_too():
    stream = Stream(Objective("seq2seq"), pairs((6, 4), (6, 4), (6, 4)))
    assert [len(b) for b in batches(stream, tokens_per_batch=20)] == [2, 1]
    assert [len(b) for b in batches(Stream(Objective("seq2seq"), pairs((6, 4), (6, 5))), tokens_per_batch=20)] == [1, 1]


def test_processes_share_the_samples_out_by_index():
    blank = {"input_ids": [5, 5], "labels": [-100, -100]}
    samples = [*draw_samples([3, 4, 5]), blank, *draw_samples([6])]
    shares = [Stream(Objective("mlm"), samples, process=p, processes=2) for p in range(2)]
    assert [[item.index for item in share] for share in shares] == [[0, 2, 4], [1]]
    assert [share.skipped for share in shares] == [0, 1]


def test_a_budget_below_one_is_refused():
    with pytest.raises(DataError, match="tokens per batch 0; expected at least 1"):
        estimate_fisher(language_model("bert"), draw_samples([4]), tokens_per_batch=0)
