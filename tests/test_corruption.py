"""What is to be guessed: BERT's masks, T5's spans, BART's infilling."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Tokenizer

from guided_dropout.corruption import Vocabulary, corrupt_spans, corrupted, infill_spans, mask_tokens
from guided_dropout.errors import DataError, ModelError

WORDS = [f"w{i}" for i in range(40)]


def bert_tokenizer():
    vocab = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    tok = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    tok.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    )  # fmt: skip


def t5_tokenizer(sentinels=100, **options):
    """Its sentinels have the ids from 43 + `sentinels` - 1 down to 43, as in T5's own vocabulary."""
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{w}", -2.0) for w in WORDS)]
    extra = [(f"<extra_id_{i}>", 0.0) for i in reversed(range(sentinels))]
    return T5Tokenizer(vocab=words + extra, extra_ids=sentinels, **options)


BERT = Vocabulary.of(bert_tokenizer())
T5 = Vocabulary.of(t5_tokenizer())


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000), index=st.integers(0, 1000), length=st.integers(1, 200))
def test_masking_depends_on_seed_and_index_alone(seed, index, length):
    ids = [2, *([5 + k % 40 for k in range(length)]), 3]
    np.random.seed(length)
    once = mask_tokens(ids, BERT, seed, index)
    np.random.seed(length + 1)
    assert mask_tokens(list(ids), BERT, seed, index) == once
    target = [y != -100 for y in once["labels"]]
    assert not target[0]
    assert not target[-1]
    assert all(x == i for x, i, t in zip(once["input_ids"], ids, target, strict=True) if not t)
    assert all(y == i for y, i, t in zip(once["labels"], ids, target, strict=True) if t)


def test_masking_rates_are_berts():
    ids = np.tile(np.arange(5, 45), 50)
    sampled = [mask_tokens(ids, BERT, 0, k) for k in range(20)]
    x = np.array([s["input_ids"] for s in sampled])
    target = np.array([s["labels"] for s in sampled]) != -100
    assert target.mean() == pytest.approx(0.15, abs=0.01)
    assert (x[target] == 4).mean() == pytest.approx(0.8, abs=0.02)
    kept = x[target] == np.broadcast_to(ids, x.shape)[target]
    assert kept.mean() == pytest.approx(0.1 + 0.1 / 40, abs=0.015)
    assert not np.isin(x[target], [0, 1, 2, 3]).any()


def test_sentinels_are_found_by_their_numbers():
    assert T5.sentinels == tuple(range(142, 42, -1))
    assert (T5.prefix, T5.suffix, T5.end) == ((), (1,), 1)
    assert BERT.sentinels == ()


@settings(max_examples=200, deadline=None)
@given(length=st.integers(0, 600), seed=st.integers(0, 1000), index=st.integers(0, 1000))
def test_spans_and_sentinels_rebuild_the_text(length, seed, index):
    ids = (np.random.default_rng(length).integers(3, 43, length)).tolist()
    sample = corrupt_spans(ids, T5, seed, index)
    assert corrupt_spans(np.asarray(ids), T5, seed, index) == sample
    inputs, labels = sample["input_ids"], sample["labels"]
    if length == 0:
        assert labels == [-100]  # which is skipped, and counted
        return
    assert (inputs[-1], labels[-1]) == (1, 1)
    sentinels = [i for i in inputs if i in T5.sentinels]
    spans = len(sentinels)
    assert spans >= 1
    assert sentinels == list(T5.sentinels[:spans])  # one for each span, in order, counting down
    assert [i for i in labels if i in T5.sentinels] == list(T5.sentinels[: spans + 1])
    assert labels[-2] == T5.sentinels[spans]  # the last one closes the last span
    assert not any(a in sentinels and b in sentinels for a, b in itertools.pairwise(inputs))
    assert max(inputs + labels) <= 142
    pieces, open_span = {}, None
    for i in labels[:-2]:
        if i in T5.sentinels:
            pieces[open_span := i] = []
        else:
            pieces[open_span].append(i)
    assert all(pieces.values())  # no span is empty
    assert [j for i in inputs[:-1] for j in pieces.get(i, [i])] == ids
    corrupted_tokens = sum(map(len, pieces.values()))
    assert abs(corrupted_tokens - 0.15 * length) <= 0.5 or corrupted_tokens == 1
    assert abs(spans - corrupted_tokens / 3) <= 0.5 or spans == 1


def test_every_part_of_a_text_is_corrupted_about_as_often():
    """But the first token, which T5 never corrupts, and the last, which it always does."""
    ids, lost = list(range(3, 43)), np.zeros(40)
    for index in range(3000):
        kept = set(corrupt_spans(ids, T5, 0, index)["input_ids"])
        lost += [i not in kept for i in ids]
    assert (lost[0], lost[-1]) == (0, 3000)
    inner = lost[3:-6] / 3000  # 6 of 40 tokens in 2 spans: one of 3 tokens at the end, one before
    assert 0.07 < inner.min() <= inner.max() < 0.12


def test_a_sentinel_in_the_text_itself_stands_for_no_span():
    sample = corrupt_spans([5, 142, 6, 141, 7, 8, 1, 9], T5, 0, 0)
    assert [i for i in sample["input_ids"] if i in T5.sentinels] == [142]


@settings(max_examples=100, deadline=None)
@given(length=st.integers(1, 300), seed=st.integers(0, 1000), index=st.integers(0, 1000))
def test_infilling_leaves_one_mask_for_each_span_and_asks_for_the_whole_text(length, seed, index):
    ids = (np.random.default_rng(length).integers(5, 45, length)).tolist()
    sample = infill_spans(ids, BERT, seed, index)
    inputs, labels = sample["input_ids"], sample["labels"]
    assert labels == [2, *ids, 3]
    assert (inputs[0], inputs[-1]) == (2, 3)
    masks = inputs.count(4)
    lost = length - (len(inputs) - 2 - masks)
    assert abs(lost - 0.3 * length) <= 0.5 or lost == 1
    assert abs(masks - lost / 3) <= 0.5 or masks == 1
    rest = iter(ids)
    assert all(i == 4 or i in rest for i in inputs[1:-1])  # what is kept is kept in order


def test_what_a_sequence_to_sequence_tokenizer_lacks_is_named():
    ids = list(range(3, 43))
    with pytest.raises(
        ModelError, match=r"40 tokens need 3 sentinels; the tokenizer \(T5Tokenizer\) has 2: use a smaller"
    ):
        corrupted("seq2seq", ids, Vocabulary.of(t5_tokenizer(2)), 0, 0)
    with pytest.raises(ModelError, match="no numbered sentinel tokens and no mask token"):
        corrupted("seq2seq", ids, Vocabulary.of(t5_tokenizer(0)), 0, 0)
    assert corrupted("seq2seq", ids, BERT, 0, 7) == {**infill_spans(ids, BERT, 0, 7), "index": 7}
    assert corrupted("seq2seq", ids, T5, 0, 7) == {**corrupt_spans(ids, T5, 0, 7), "index": 7}
    with pytest.raises(DataError, match="expected mlm, causal or seq2seq"):
        corrupted("classification", ids, T5, 0, 0)


def test_tokens_that_were_added_as_special_are_neither_masked_nor_put_in():
    tokenizer = bert_tokenizer()
    tokenizer.add_tokens(["<speaker>"], special_tokens=True)
    tokenizer.add_tokens(["word"])
    speaker, word = tokenizer.convert_tokens_to_ids(["<speaker>", "word"])
    vocabulary = Vocabulary.of(tokenizer)
    assert not np.isin([*tokenizer.all_special_ids, speaker], vocabulary.ordinary).any()
    assert word in vocabulary.ordinary
    samples = [mask_tokens([speaker, 7] * 20, vocabulary, 0, k) for k in range(20)]
    assert {y for s in samples for y in s["labels"]} == {-100, 7}


def test_tokens_without_a_row_in_the_model_are_put_into_no_sample():
    tokenizer = bert_tokenizer()
    tokenizer.add_tokens([f"new{i}" for i in range(40)])
    vocabulary = Vocabulary.of(tokenizer, 45)
    assert vocabulary.ordinary.tolist() == list(range(5, 45))
    assert max(max(mask_tokens([7] * 200, vocabulary, 0, k)["input_ids"]) for k in range(5)) < 45
    without_a_mask = bert_tokenizer()
    without_a_mask.add_special_tokens({"mask_token": "<mask>"})
    for objective in ("mlm", "seq2seq"):
        with pytest.raises(ModelError, match="a mask token with number 45; expected less than 45, the model's vocab"):
            corrupted(objective, [7] * 20, Vocabulary.of(without_a_mask, 45), 0, 0)
    assert corrupted("causal", [7], Vocabulary.of(without_a_mask, 45), 0, 0)["labels"] == [2, 7, 3]
    with pytest.raises(ModelError, match="a sentinel with number 142; expected less than 130"):
        corrupted("seq2seq", [7] * 20, Vocabulary.of(t5_tokenizer(), 130), 0, 0)


def numbered_tokenizer(*prefixes):
    """With a longer series of special tokens for each further prefix."""
    vocab = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    more = [f"<{name}_{i}>" for k, name in enumerate(prefixes) for i in range(4 + k)]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="<unk>")), pad_token="<pad>", eos_token="</s>",
        unk_token="<unk>", extra_special_tokens=more,
    )  # fmt: skip


def test_of_several_series_of_tokens_those_called_extra_id_are_the_sentinels():
    both = numbered_tokenizer("extra_id", "item")
    names = [f"<extra_id_{i}>" for i in range(4)]
    assert both.convert_ids_to_tokens([*Vocabulary.of(both).sentinels]) == names
    assert len(Vocabulary.of(numbered_tokenizer("item")).sentinels) == 4
    unclear = Vocabulary.of(numbered_tokenizer("item", "place"))
    with pytest.raises(ModelError, match="2 series of numbered tokens, from <item_0> and <place_0> on; expected one"):
        corrupted("seq2seq", [7] * 20, unclear, 0, 0)
    assert corrupted("causal", [7], unclear, 0, 0)["labels"] == [7]


def test_what_stands_around_a_text_is_found_where_a_word_is_no_token():
    def tokenizer(*letters):
        vocab = {w: i for i, w in enumerate(["[PAD]", "[CLS]", "[SEP]", *letters])}
        tok = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        tok.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=tok, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
        )  # fmt: skip

    assert Vocabulary.of(tokenizer("C", "G", "T")).framed([3, 4]) == [1, 3, 4, 2]
    with pytest.raises(ModelError, match="makes no token of anything in its own vocabulary"):
        Vocabulary.of(tokenizer())
