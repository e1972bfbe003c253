import gzip
import lzma

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
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


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000), index=st.integers(0, 1000), length=st.integers(1, 200))
def test_masking_depends_on_seed_and_index_alone(seed, index, length):
    tok = tokenizer()
    ids = [2, *([5 + k % 40 for k in range(length)]), 3]
    np.random.seed(length)
    once = corpus.mask_tokens(ids, tok, seed, index)
    np.random.seed(length + 1)
    assert corpus.mask_tokens(list(ids), tok, seed, index) == once
    target = [y != -100 for y in once["labels"]]
    assert not target[0]
    assert not target[-1]
    assert all(x == i for x, i, t in zip(once["input_ids"], ids, target, strict=True) if not t)
    assert all(y == i for y, i, t in zip(once["labels"], ids, target, strict=True) if t)


def test_masks_differ_between_samples_and_do_not_depend_on_how_many_there_are():
    few = corpus.lm_samples(TEXT, tokenizer(), objective="mlm", num_samples=4, max_length=40, seed=3)
    many = corpus.lm_samples(TEXT, tokenizer(), objective="mlm", num_samples=12, max_length=40, seed=3)
    assert many[:4] == few
    assert corpus.mask_tokens(range(5, 45), tokenizer(), 0, 0) != corpus.mask_tokens(range(5, 45), tokenizer(), 0, 1)


def test_masking_rates_are_berts():
    tok, ids = tokenizer(), np.tile(np.arange(5, 45), 50)
    sampled = [corpus.mask_tokens(ids, tok, 0, k) for k in range(20)]
    x = np.array([s["input_ids"] for s in sampled])
    target = np.array([s["labels"] for s in sampled]) != -100
    assert target.mean() == pytest.approx(0.15, abs=0.01)
    assert (x[target] == 4).mean() == pytest.approx(0.8, abs=0.02)
    kept = x[target] == np.broadcast_to(ids, x.shape)[target]
    assert kept.mean() == pytest.approx(0.1 + 0.1 / 40, abs=0.015)
    assert not np.isin(x[target], [0, 1, 2, 3]).any()


@pytest.mark.parametrize(("suffix", "opener"), [(".txt", open), (".gz", gzip.open), (".xz", lzma.open)])
def test_reads_plain_and_compressed_text(tmp_path, suffix, opener):
    path = tmp_path / f"t{suffix}"
    with opener(path, "wt", encoding="utf-8") as f:
        f.write("\n Élan vital \n\nzwei\n")
    assert corpus.read_text(path) == ["Élan vital", "zwei"]


def test_bad_text_is_named(tmp_path):
    with pytest.raises(DataError, match=r"cannot read the text .*nowhere.txt: No such file"):
        corpus.read_text(tmp_path / "nowhere.txt")
    blank = tmp_path / "blank.txt"
    blank.write_text(" \n\n")
    with pytest.raises(DataError, match=r"blank\.txt has no text"):
        corpus.read_text(blank)
    latin = tmp_path / "latin.txt"
    latin.write_bytes("Élan".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt is not UTF-8"):
        corpus.read_text(latin)
    cut = tmp_path / "cut.xz"
    cut.write_bytes(lzma.compress(b"words " * 1000)[:-20])
    with pytest.raises(DataError, match=r"cannot read the text .*cut.xz"):
        corpus.read_text(cut)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "number of samples 0; expected at least 1"),
        ({"max_length": 3}, "max length 3; expected at least 4"),
        ({"objective": "classification"}, "expected mlm or causal"),
    ],
)
def test_bad_numbers_are_named(options, message):
    with pytest.raises(DataError, match=message):
        corpus.lm_samples(TEXT, tokenizer(), **{"objective": "mlm", "num_samples": 2, "max_length": 10, **options})
    with pytest.raises(DataError, match="the text has no tokens"):
        corpus.lm_samples([], tokenizer(), objective="mlm", num_samples=2, max_length=10)


def test_a_masked_lm_needs_a_mask_token():
    with pytest.raises(ModelError, match="no mask token"):
        corpus.lm_samples(TEXT, tokenizer(masked=False), objective="mlm", num_samples=2, max_length=10)
