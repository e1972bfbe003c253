import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from guided_dropout import corpus
from guided_dropout.errors import DataError, ModelError

WORDS = [f"w{i}" for i in range(40)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TEXT = [" ".join(WORDS[(i * 7 + j) % 40] for j in range(23)) for i in range(30)]


def tokenizer(*, masked=True):
    vocab = {w: i for i, w in enumerate(SPECIAL + WORDS)}
    tok = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    if masked:
        tok.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=tok, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
            mask_token="[MASK]",
        )  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=tok, unk_token="[UNK]")


def test_blocks_cover_the_text_once_with_special_tokens_around():
    samples = corpus.lm_samples(TEXT, tokenizer(masked=False), objective="causal", num_samples=10**6, max_length=10)
    ids = tokenizer(masked=False)(TEXT)["input_ids"]
    stream = [i for row in ids for i in row]
    assert len(samples) == len(stream) // 10
    blocks = {tuple(s["input_ids"]) for s in samples}
    assert blocks == {tuple(stream[k : k + 10]) for k in range(0, len(stream) - 9, 10)}
    assert all(s["labels"] == s["input_ids"] for s in samples)
    masked = corpus.lm_samples(TEXT, tokenizer(), objective="mlm", num_samples=5, max_length=10)
    assert {(s["input_ids"][0], s["input_ids"][-1], len(s["input_ids"])) for s in masked} == {(2, 3, 10)}


def test_masks_differ_between_samples_and_do_not_depend_on_how_many_there_are():
    few = corpus.lm_samples(TEXT, tokenizer(), objective="mlm", num_samples=4, max_length=40, seed=3)
    many = corpus.lm_samples(TEXT, tokenizer(), objective="mlm", num_samples=12, max_length=40, seed=3)
    assert list(many[:4]) == list(few)
    again = corpus.lm_samples([TEXT[0]] * 30, tokenizer(), objective="mlm", num_samples=12, max_length=25)
    assert len({tuple(s["labels"]) for s in again}) > 6


def test_samples_are_the_same_again_and_a_slice_goes_on_with_their_numbers():
    for number in (15, None):
        samples = corpus.lm_samples(TEXT, tokenizer(), objective="mlm", num_samples=number, max_length=30, seed=3)
        whole = list(samples)
        assert [s["index"] for s in whole] == list(range(len(whole)))
        assert list(samples) == whole
        assert list(samples[4:]) == whole[4:]
        assert list(samples[4:][3:]) == whole[7:]
    with pytest.raises(DataError, match=r"expected samples\[n:\]"):
        samples[:3]


def test_all_samples_come_in_the_order_of_the_text_and_are_read_as_they_are_asked_for():
    ids = [i for row in tokenizer(masked=False)(TEXT)["input_ids"] for i in row]
    read = []
    endless = (read.append(0) or TEXT[k % 30] for k in itertools.count())
    samples = iter(
        corpus.lm_samples(endless, tokenizer(masked=False), objective="causal", num_samples=None, max_length=10)
    )
    assert [next(samples)["input_ids"] for _ in range(5)] == [ids[k : k + 10] for k in range(0, 50, 10)]
    assert len(read) < 10_000


@settings(max_examples=30, deadline=None)
@given(portion=st.integers(1, 4000), length=st.integers(4, 60), masked=st.booleans(), number=st.integers(1, 99))
def test_the_portions_in_which_a_text_is_tokenised_change_nothing(portion, length, masked, number):
    options = {"objective": "mlm" if masked else "causal", "num_samples": number, "max_length": length}
    whole = list(corpus.lm_samples(TEXT, tokenizer(masked=masked), **options))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "_PORTION", portion)
        assert list(corpus.lm_samples(iter(TEXT), tokenizer(masked=masked), **options)) == whole


def test_each_block_is_drawn_equally_often_and_none_twice():
    drawn, places = np.zeros(69), np.zeros(69)
    text = [" ".join(WORDS[(i % 40 + j * (1 + i // 40)) % 40] for j in range(10)) for i in range(69)]
    blocks = [tuple(row) for row in tokenizer(masked=False)(text)["input_ids"]]
    assert len(set(blocks)) == 69
    for seed in range(600):
        samples = corpus.lm_samples(
            text, tokenizer(masked=False), objective="causal", num_samples=23, max_length=10, seed=seed
        )
        rows = [blocks.index(tuple(s["input_ids"])) for s in samples]
        assert len(set(rows)) == 23
        drawn[rows] += 1
        places[rows] += range(23)
    assert stats.chisquare(drawn).pvalue > 1e-4
    assert np.mean(places[:35] / drawn[:35]) == pytest.approx(11, abs=0.5)  # drawn early as often as late


def test_a_text_shorter_than_a_block_is_one_sample():
    for number in (3, None):
        (sample,) = corpus.lm_samples(["w1 w2"], tokenizer(), objective="mlm", num_samples=number, max_length=10)
        assert len(sample["input_ids"]) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "number of samples 0; expected at least 1"),
        ({"seed": -1}, "seed -1; expected 0 or more"),
        ({"max_length": 3}, "max length 3; expected at least 4"),
        ({"objective": "classification"}, "expected mlm, causal or seq2seq"),
    ],
)
def test_bad_numbers_are_named(options, message):
    with pytest.raises(DataError, match=message):
        corpus.lm_samples(TEXT, tokenizer(), **{"objective": "mlm", "num_samples": 2, "max_length": 10, **options})
    with pytest.raises(DataError, match="the text has no tokens"):
        corpus.lm_samples([], tokenizer(), objective="mlm", num_samples=2, max_length=10)


def test_a_mask_token_that_the_model_does_not_know_is_told_before_the_text_is_read():
    def unread():
        pytest.fail("the text was read")
        yield ""

    with pytest.raises(ModelError, match="a mask token with number 4; expected less than 4"):
        corpus.lm_samples(unread(), tokenizer(), objective="mlm", num_samples=2, max_length=10, rows=4)


def test_a_masked_lm_needs_a_mask_token():
    with pytest.raises(ModelError, match="no mask token"):
        corpus.lm_samples(TEXT, tokenizer(masked=False), objective="mlm", num_samples=2, max_length=10)
