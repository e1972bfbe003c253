"""The demo's text is prose, its task is fair, and the quickstart ends in a report and goes on where it was cut off."""

import io
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tiny import save, tiny_bert_config
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertForMaskedLM, PreTrainedTokenizerFast

from guided_dropout.cli import quickstart as module
from guided_dropout.cli.quickstart import Settings, quickstart
from guided_dropout.demo import text
from guided_dropout.demo.task import SWAPPED_WORDS, swap_words, swapped_words
from guided_dropout.errors import ArtefactError, DataError
from guided_dropout.results import RunResult

SMALL = Settings(fisher_samples=4, fisher_length=16, train_sentences=16, validation_sentences=8, epochs=1)
WORDS = st.lists(st.sampled_from(["the", "The", "value", "of", "list,", "x1", "empty"]), min_size=1, max_size=12)


def test_paragraphs_are_prose():
    paragraphs = text.demo_paragraphs()
    assert len(paragraphs) == len(set(paragraphs)) > 500
    assert sum(map(len, paragraphs)) > 100_000
    for p in paragraphs:
        assert "\n" not in p
        assert ">>>" not in p
        assert "::=" not in p
        assert len(p.split()) >= 8


def test_sentences_are_plain_and_none_comes_twice():
    sentences = text.demo_sentences()
    assert len(sentences) > 1000
    assert len({s.lower() for s in sentences}) == len(sentences)
    for s in sentences:
        assert s[0].isupper()
        assert s[-1] in ".?!"
        assert 6 <= len(s.split()) <= 30
        assert not set(s) & set('"*`_=<>|')


def test_a_python_without_help_topics_is_told_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match="expected a full CPython"):
        text.demo_paragraphs.__wrapped__()


def test_too_little_text_is_an_error(monkeypatch):
    monkeypatch.setattr(text, "demo_paragraphs", lambda: ("One sentence of six plain words.",))
    with pytest.raises(DataError, match="only 1 sentences"):
        text.demo_sentences.__wrapped__()


@given(WORDS, st.integers(0, 5))
def test_a_swap_keeps_the_words_and_changes_the_sentence(words, seed):
    sentence = " ".join(words)
    try:
        swapped = swap_words(sentence, np.random.default_rng(seed)).split()
    except DataError:
        return
    assert sorted(swapped) == sorted(words)
    assert (swapped[0], swapped[-1]) == (words[0], words[-1])
    assert 2 <= sum(a.lower() != b.lower() for a, b in zip(swapped, words, strict=True)) <= 6
    assert all(a == b for a, b in zip(swapped, words, strict=True) if not b.isalpha())
    assert swapped == swap_words(sentence, np.random.default_rng(seed)).split()


@pytest.mark.parametrize("sentence", ["Nothing here.", "Too the the much.", "a, b, c, d, e."])
def test_what_cannot_be_swapped_is_refused(sentence):
    with pytest.raises(DataError, match="no two words to swap"):
        swap_words(sentence, np.random.default_rng(0))


def test_task_is_balanced_seeded_and_its_splits_share_no_sentence():
    train, validation = swapped_words(num_train=300, num_validation=100, seed=3)
    assert (len(train), len(validation)) == (600, 200)
    assert (train, validation) == swapped_words(num_train=300, num_validation=100, seed=3)
    assert train != swapped_words(num_train=300, num_validation=100, seed=4)[0]
    for part in (train, validation):
        assert sum(part.labels) == len(part) / 2
        assert len({t for t, label in part if label == 1} & set(part.texts)) == len(part) / 2
        originals = {t[0] for t, label in part if label == 0}
        assert originals <= set(text.demo_sentences())
    bags = [{tuple(sorted(t[0].lower().split())) for t in part.texts} for part in (train, validation)]
    assert len(bags[0]) <= 300
    written = [{t[0].lower() for t, label in part if label == 0} for part in (train, validation)]
    assert not written[0] & written[1]
    for part, own in ((train, written[0]), (validation, written[1])):
        twins = {tuple(sorted(s.split())) for s in own}
        assert all(tuple(sorted(t[0].lower().split())) in twins for t in part.texts)


def test_more_sentences_than_there_are():
    with pytest.raises(DataError, match="found 2 sentences"):
        swapped_words(num_train=2, num_validation=1, sentences=["A b c d e.", "A c d e f.", "A."])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A BERT of a few thousand weights with a word-piece vocabulary of the demo's own text."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(text.demo_paragraphs()[:100], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=48,
    ).save_pretrained(folder)  # fmt: skip
    config = tiny_bert_config(vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=48)
    return save(BertForMaskedLM(config), folder, tokenizer=False)


def run(out, model, seeds=1, settings=SMALL):
    return quickstart(out, seeds=seeds, model=model, settings=settings, console=Console(quiet=True))


def test_quickstart_makes_everything_and_goes_on_where_it_was_cut_off(tmp_path, model, monkeypatch):
    out, trained = tmp_path / "its folder", []
    original = module.finetune

    def counting(*args, **options):
        if len(trained) == 2 and not (out / "again").exists():
            raise KeyboardInterrupt
        trained.append((options["arm"], options["seed"]))
        return original(*args, **options)

    monkeypatch.setattr(module, "finetune", counting)
    with pytest.raises(KeyboardInterrupt):
        run(out, model)
    assert trained == [("dropout", 0), ("uniform", 0)]
    (out / "runs" / "guided-0").mkdir()  # as where it was killed while it wrote the result
    (out / "runs" / "guided-0" / ".result.json.x1y2").write_text("{")
    first = (out / "runs" / "dropout-0" / "result.json").read_bytes()
    (out / "again").write_text("")
    told = Console(file=io.StringIO(), markup=False)
    paths = quickstart(out, seeds=2, model=model, settings=SMALL, console=told)
    assert "4 Report" in told.file.getvalue()

    assert sorted(trained) == sorted((arm, seed) for arm in module.ARMS for seed in (0, 1))
    assert (out / "runs" / "dropout-0" / "result.json").read_bytes() == first
    assert all(p.exists() for p in paths)
    assert {p.name for p in paths} == {"report.html", "report.md", "fisher", "schedule.json", "runs"}
    results = {arm: RunResult.load(out / "runs" / f"{arm}-1") for arm in module.ARMS}
    assert results["guided"].pairing == results["dropout"].pairing == results["uniform"].pairing
    assert results["guided"].rates["mean"] == pytest.approx(results["uniform"].rates["mean"])
    assert (results["guided"].rates["min"], results["guided"].rates["max"]) == (0.0, 0.1)
    assert SWAPPED_WORDS.name in (out / "report.md").read_text()
    assert f"guided-dropout quickstart --out '{out}' --seeds 2" in (out / "report.md").read_text()
    with pytest.raises(ArtefactError, match=r"epochs 1; expected 2"):
        run(out, model, settings=replace(SMALL, epochs=2))
    with pytest.raises(ArtefactError, match="fisher_samples"):  # which no run's own recipe would tell
        run(out, model, settings=replace(SMALL, fisher_samples=SMALL.fisher_samples + 1))
    damaged = json.loads((out / "runs" / "guided-0" / "result.json").read_text())
    damaged["recipe"]["learning_rate"] = 1.0
    (out / "runs" / "guided-0" / "result.json").write_text(json.dumps(damaged))
    with pytest.raises(ArtefactError, match=r"learning_rate 1\.0"):
        run(out, model)


def test_quickstart_leaves_other_folders_alone(tmp_path, model):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ArtefactError, match="other files"):
        run(tmp_path, model)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_quickstart_needs_a_seed(tmp_path):
    with pytest.raises(DataError, match="found 0 seeds"):
        quickstart(tmp_path, seeds=0)
