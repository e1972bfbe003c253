"""Tokens made once, and the order of a training's examples."""

import itertools

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tiny import COLOUR, colour_examples, save_tiny_bert

from guided_dropout.encoding import LengthGroups, encode, order_name
from guided_dropout.errors import DataError
from guided_dropout.models import load_tokenizer
from guided_dropout.tasks import Examples


@given(st.lists(st.integers(1, 60), min_size=1, max_size=400), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_each_epoch_reads_each_example_once_in_an_order_of_its_own(lengths, batch_size, seed):
    sampler, again = (LengthGroups(lengths, batch_size, seed) for _ in range(2))
    epochs = [list(sampler) for _ in range(2)]
    assert all(sorted(epoch) == list(range(len(lengths))) for epoch in epochs)
    assert epochs == [list(again) for _ in range(2)]
    if len(lengths) > 40:
        assert epochs[0] != epochs[1]
        assert epochs[0] != list(LengthGroups(lengths, batch_size, seed + 1))


def test_batches_hold_little_padding_and_come_in_no_order_of_length():
    lengths = torch.randint(5, 60, (1600,), generator=torch.Generator().manual_seed(0)).tolist()

    def batches(order):
        return torch.tensor([lengths[i] for i in order]).view(-1, 16)

    def padding(order):
        found = batches(order)
        return 1 - found.sum().item() / (found.amax(1).sum().item() * 16)

    grouped = list(LengthGroups(lengths, 16, 0))
    assert padding(grouped) < 0.08 < 0.4 < padding(range(1600))
    longest = batches(grouped).amax(1).float()
    place = torch.arange(len(longest)).float()
    assert abs(torch.corrcoef(torch.stack([longest, place]))[0, 1]) < 0.3


@given(st.integers(80, 1600), st.integers(0, 2**32 - 1))
@example(249, 0)
def test_each_epoch_puts_other_examples_together_however_few_there_are(count, seed):
    lengths = torch.randint(5, 60, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    sampler = LengthGroups(lengths, 16, seed)

    def together():
        batches = torch.tensor(list(sampler)[: count // 16 * 16]).view(-1, 16)
        return {pair for b in batches.tolist() for pair in itertools.combinations(sorted(b), 2)}

    first, second = together(), together()
    assert len(first & second) < 0.6 * len(first)


def test_a_recipe_tells_of_orders_that_mix_otherwise():
    assert order_name(768, 16) == order_name(10**6, 16) == "batches of like lengths"
    assert len({order_name(767, 16), order_name(249, 16), order_name(20, 16), order_name(768, 16)}) == 4


def test_a_cache_changes_nothing_and_tokenises_each_text_once(tmp_path, monkeypatch):
    tokenizer = load_tokenizer(save_tiny_bert(tmp_path / "bert"))
    examples, cache = colour_examples(30, seed=3), {}
    plain = encode(examples, COLOUR, tokenizer, 16)
    first = encode(examples.take(range(10)), COLOUR, tokenizer, 16, cache)
    assert [first[i] for i in range(10)] == [plain[i] for i in range(10)]
    seen = []
    real = type(tokenizer).__call__
    monkeypatch.setattr(type(tokenizer), "__call__", lambda self, a, *r, **k: seen.extend(a) or real(self, a, *r, **k))
    whole = encode(examples, COLOUR, tokenizer, 16, cache)
    assert [whole[i] for i in range(30)] == [plain[i] for i in range(30)]
    assert set(seen) == {t[0] for t in examples.texts} - {t[0] for t in examples.take(range(10)).texts}
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize(
    ("text", "label", "message"),
    [
        (("red",), "green", r"memory: found the label 'green'; expected a class index below \d"),
        (("red",), None, r"memory: found the label None"),
        ((None,), 0, r"memory: found the text \(None,\); expected strings"),
        (("red \ud83d",), 0, r"memory: found the text \('red .ud83d',\); expected strings of whole characters"),
    ],
)
def test_what_is_no_text_or_label_is_named(tmp_path, text, label, message):
    tokenizer = load_tokenizer(save_tiny_bert(tmp_path))
    with pytest.raises(DataError, match=message):
        encode(Examples([("the car",), text], [0, label]), COLOUR, tokenizer, 32)


def test_a_pair_may_lack_its_second_text(tmp_path):
    tokenizer = load_tokenizer(save_tiny_bert(tmp_path))
    pairs = Examples([("the car is red", ""), ("red", "the car"), ("red", "")], [0, 1, 0])
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    words = tokenizer("the car is red", add_special_tokens=False)["input_ids"]
    for examples in (pairs, pairs[:1]):
        row = encode(examples, COLOUR, tokenizer, 32)[0]
        assert row["input_ids"] == [cls, *words, sep, sep]
        assert row["token_type_ids"] == [0] * (len(words) + 2) + [1]
