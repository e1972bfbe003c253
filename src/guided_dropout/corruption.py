"""What a language model has to guess, as a function of (seed, sample index) alone.

Masked LM: 15 % of the tokens, as in BERT. Sequence to sequence: spans of 3 tokens on average, 15 % of the tokens, each
replaced by a sentinel, as in T5 (Raffel et al., 2020, section 3.1.4); where the tokenizer has no sentinels but a mask
token, 30 % of the tokens, each span replaced by one mask token, as in BART (Lewis et al., 2020, text infilling; spans
are never empty and sentences stay in order).
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from guided_dropout.errors import DataError, ModelError
from guided_dropout.samples import IGNORE

MASK_SHARE = 0.15
SPAN_SHARE = 0.15
INFILL_SHARE = 0.3
MEAN_SPAN = 3.0


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer's tokens are for, found once.

    Attributes:
        name: the tokenizer's class, for messages.
        prefix: ids before a text.
        suffix: ids after a text.
        special: ids of all special tokens, int64.
        ordinary: ids of all others that the model knows, int64.
        mask: id of the mask token, if there is one.
        end: id of the end-of-text token, if there is one.
        series: the numbered extra tokens that may be sentinels: the first one's name → their ids in the order of their
            numbers (T5's ids count down).
        rows: how many tokens the model knows, if that is given.
    """

    name: str
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    special: np.ndarray
    ordinary: np.ndarray
    mask: int | None
    end: int | None
    series: Mapping[str, tuple[int, ...]]
    rows: int | None = None

    @classmethod
    def of(cls, tokenizer: Any, rows: int | None = None) -> Vocabulary:
        """Look at a transformers tokenizer, for a model with so many rows in its token table."""
        # Some are special by their own word alone, as a mark between two speakers that was added.
        added = [number for number, token in tokenizer.added_tokens_decoder.items() if token.special]
        special = np.unique(np.asarray([*tokenizer.all_special_ids, *added], dtype=np.int64))
        ordinary = np.setdiff1d(np.arange(len(tokenizer)), special)
        prefix, suffix = special_tokens(tokenizer, ordinary)
        return cls(
            name=type(tokenizer).__name__,
            prefix=tuple(prefix),
            suffix=tuple(suffix),
            special=special,
            ordinary=ordinary if rows is None else ordinary[ordinary < rows],
            mask=tokenizer.mask_token_id,
            end=tokenizer.eos_token_id,
            series={one[0]: tuple(tokenizer.convert_tokens_to_ids(one)) for one in _numbered(tokenizer)},
            rows=rows,
        )

    @property
    def sentinels(self) -> tuple[int, ...]:
        """Ids of the sentinels in the order of their numbers; none where no tokens are numbered.

        Raises:
            ModelError: more than one series of tokens may be meant.
        """
        if len(self.series) > 1:
            raise ModelError(
                f"the tokenizer ({self.name}) has {len(self.series)} series of numbered tokens, from "
                f"{' and '.join(self.series)} on; expected one, or one called extra_id, as T5's sentinels are: samples "
                "with input_ids and labels can be given from Python"
            )
        return next(iter(self.series.values()), ())

    def known(self, what: str, *ids: int) -> None:
        """Make sure that the model has rows for tokens that are put into samples.

        Raises:
            ModelError: it has not.
        """
        if self.rows is not None and max(ids) >= self.rows:
            raise ModelError(
                f"the tokenizer ({self.name}) has {what} with number {max(ids)}; expected less than {self.rows}, the "
                "model's vocabulary: use the tokenizer that the model was pretrained with, or give the model's table "
                "more rows (resize_token_embeddings) and train them"
            )

    def framed(self, ids: Sequence[int]) -> list[int]:
        """The ids of a text with the special tokens around it."""
        return [*self.prefix, *ids, *self.suffix]


def special_tokens(tokenizer: Any, ordinary: Iterable[int]) -> tuple[list[int], list[int]]:
    """The ids that `tokenizer` puts before and after a text, found by encoding one.

    Raises:
        ModelError: neither ``"a"`` nor any of its `ordinary` tokens is a token to it.
    """
    for text in itertools.chain(["a"], (tokenizer.convert_ids_to_tokens(int(number)) for number in ordinary)):
        if bare := tokenizer(text, add_special_tokens=False)["input_ids"]:
            break
    else:
        raise ModelError(
            f"the tokenizer ({type(tokenizer).__name__}) makes no token of anything in its own vocabulary; expected "
            "one that reads text: use the tokenizer that the model was pretrained with"
        )
    full = tokenizer(text, add_special_tokens=True)["input_ids"]
    for i in range(len(full) - len(bare) + 1):
        if full[i : i + len(bare)] == bare:
            return full[:i], full[i + len(bare) :]
    return [], []


def _numbered(tokenizer: Any) -> list[list[str]]:
    """Each series of special tokens that differ in nothing but a number, from 0 on without a gap.

    Where no special token is numbered, tokens of the vocabulary in angle brackets are looked at (mT5's). Where some are
    called ``extra_id``, as those of T5 and its kin, the others are meant for something else.
    """
    for pattern, names in (
        (r"(\D+)(\d+)(\D*)", tokenizer.all_special_tokens),
        (r"(▁?<\D+)(\d+)(\D*>)", tokenizer.get_vocab()),
    ):
        series: defaultdict[tuple[str, str], dict[int, str]] = defaultdict(dict)
        for name in names:
            if match := re.fullmatch(pattern, name):
                series[match[1], match[3]][int(match[2])] = name
        whole = [[s[i] for i in sorted(s)] for s in series.values() if len(s) > 1 and max(s) == len(s) - 1]
        if whole:
            return [one for one in whole if "extra_id" in one[0]] or whole
    return []


def corrupted(objective: str, ids: Sequence[int], vocabulary: Vocabulary, seed: int, index: int) -> dict[str, Any]:
    """The sample number `index` for a block of tokens without special tokens around.

    Depends on nothing but its arguments: neither on the other samples nor on how they are batched.

    Args:
        objective: ``"mlm"``, ``"causal"`` (each token is a target) or ``"seq2seq"``.
        ids: the block.
        vocabulary: of the model's tokenizer.
        seed: with `index`, draws what is to be guessed.
        index: the sample's number.

    Returns:
        ``input_ids``, ``labels`` (−100 is no target) and ``index``.

    Raises:
        DataError: another objective.
        ModelError: a tokenizer without the tokens that the objective needs, or with too few of them.
    """
    if objective == "causal":
        row = vocabulary.framed(ids)
        sample = {"input_ids": row, "labels": list(row)}
    elif objective == "mlm":
        sample = mask_tokens(vocabulary.framed(ids), vocabulary, seed, index)
    elif objective == "seq2seq":
        corrupt = corrupt_spans if vocabulary.sentinels or vocabulary.mask is None else infill_spans
        sample = corrupt(ids, vocabulary, seed, index)
    else:
        raise DataError(f"no samples of text for objective {objective!r}; expected mlm, causal or seq2seq")
    return {**sample, "index": index}


def mask_tokens(ids: Sequence[int], vocabulary: Vocabulary, seed: int, index: int) -> dict[str, list[int]]:
    """Mask 15 % of the ordinary tokens, as BERT's pretraining does; of these 10 % become random and 10 % stay."""
    if vocabulary.mask is None:
        raise ModelError(
            f"the tokenizer ({vocabulary.name}) has no mask token, which a masked LM needs; "
            "expected a masked LM's tokenizer: use --objective causal for a next-token model"
        )
    vocabulary.known("a mask token", vocabulary.mask)
    row = np.asarray(ids, dtype=np.int64)
    rng = np.random.default_rng([seed, 1, index])
    target = (rng.random(len(row)) < MASK_SHARE) & ~np.isin(row, vocabulary.special)
    fate = rng.random(len(row))
    noise = rng.choice(vocabulary.ordinary, size=len(row))
    inputs = np.where(target & (fate < 0.8), vocabulary.mask, np.where(target & (fate >= 0.9), noise, row))
    return {"input_ids": inputs.tolist(), "labels": np.where(target, row, IGNORE).tolist()}


def corrupt_spans(ids: Sequence[int], vocabulary: Vocabulary, seed: int, index: int) -> dict[str, list[int]]:
    """T5's span corruption: ``a b <0> e <1>`` → ``<0> c d <1> f g <2> end``.

    Special tokens in the text itself are left out, so that each sentinel stands for one span.
    """
    if not vocabulary.sentinels or vocabulary.end is None:
        raise ModelError(
            f"the tokenizer ({vocabulary.name}) has no numbered sentinel tokens and no mask token, or no end-of-text "
            "token; expected T5's extra ids, or BART's mask: samples with input_ids and labels can be given from Python"
        )
    row = _ordinary(ids, vocabulary)
    spans = noise_spans(len(row), SPAN_SHARE, np.random.default_rng([seed, 1, index]))
    if len(spans) >= len(vocabulary.sentinels):
        raise ModelError(
            f"{len(row)} tokens need {len(spans) + 1} sentinels; the tokenizer ({vocabulary.name}) has "
            f"{len(vocabulary.sentinels)}: use a smaller --max-length"
        )
    vocabulary.known("a sentinel", *vocabulary.sentinels[: len(spans) + 1])
    inputs, labels, position = [], [], 0
    for (start, end), sentinel in zip(spans, vocabulary.sentinels, strict=False):
        inputs += [*row[position:start], sentinel]
        labels += [sentinel, *row[start:end]]
        position = end
    labels = [*labels, vocabulary.sentinels[len(spans)], vocabulary.end] if spans else [IGNORE]
    return {"input_ids": vocabulary.framed([*inputs, *row[position:]]), "labels": labels}


def infill_spans(ids: Sequence[int], vocabulary: Vocabulary, seed: int, index: int) -> dict[str, list[int]]:
    """BART's text infilling: ``a b <mask> e <mask>`` → the whole text."""
    assert vocabulary.mask is not None
    vocabulary.known("a mask token", vocabulary.mask)
    row = _ordinary(ids, vocabulary)
    inputs, position = [], 0
    for start, end in noise_spans(len(row), INFILL_SHARE, np.random.default_rng([seed, 1, index])):
        inputs += [*row[position:start], vocabulary.mask]
        position = end
    labels = vocabulary.framed(row) if row else [IGNORE]
    return {"input_ids": vocabulary.framed([*inputs, *row[position:]]), "labels": labels}


def noise_spans(length: int, share: float, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Where spans of about `MEAN_SPAN` tokens begin and end, as in T5's ``random_spans_noise_mask``.

    The number of corrupted tokens is ``length · share`` rounded, at least 1, that of spans follows; they and the
    tokens between them are cut at random places into as many pieces. So no span is empty and none touches another.
    """
    if length < 2:
        return [(0, length)] if length else []
    noise = min(max(round(length * share), 1), length - 1)
    count = min(max(round(noise / MEAN_SPAN), 1), noise, length - noise)
    kept, lost = _pieces(length - noise, count, rng), _pieces(noise, count, rng)
    ends = np.cumsum(kept + lost)
    return list(zip((ends - lost).tolist(), ends.tolist(), strict=True))


def _pieces(total: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Lengths [count], all at least 1, of `total` cut at random."""
    cuts = np.sort(rng.choice(total - 1, count - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def _ordinary(ids: Sequence[int], vocabulary: Vocabulary) -> list[int]:
    row = np.asarray(ids, dtype=np.int64)
    return row[~np.isin(row, vocabulary.special)].tolist()
