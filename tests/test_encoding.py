"""Tokens made once."""

import pytest
from tiny import COLOUR, colour_examples, save_tiny_bert

from guided_dropout.data.encoding import encode
from guided_dropout.data.tasks import Examples
from guided_dropout.errors import DataError
from guided_dropout.models import load_tokenizer


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
