"""Text → tokenised samples for a language model's own objective, in memory that does not grow with the text.

The text is cut into blocks of `max_length` tokens, special tokens included. Each block gets a random number, a
function of (seed, its place in the text); the samples are the blocks with the smallest numbers, smallest first. That is
a uniform draw without replacement from a text of any length in one pass, holding no more than the samples; fewer
samples are the first ones of more. Or all blocks are taken in the text's order, without the pass.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np

from guided_dropout.corruption import Vocabulary, corrupted
from guided_dropout.errors import DataError

# Text is tokenised in portions of so many characters: enough for the tokenizer's threads, and little memory.
_PORTION = 1 << 18

Build = Callable[[Sequence[int], int], dict[str, Any]]


class DrawnSamples(Sequence[dict[str, Any]]):
    """Samples whose blocks are held; what is to be guessed is drawn when a sample is asked for.

    A slice keeps the samples' numbers, so that ``samples[n:]`` goes on where a run over ``samples[:n]`` ended.
    """

    def __init__(self, blocks: Sequence[np.ndarray], build: Build, numbers: range | None = None):
        self._blocks, self._build = blocks, build
        self._numbers = range(len(blocks)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> DrawnSamples: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | DrawnSamples:
        if isinstance(index, slice):
            return DrawnSamples(self._blocks, self._build, self._numbers[index])
        number = self._numbers[index]
        return self._build(self._blocks[number].tolist(), number)


class StreamedSamples(Iterable[dict[str, Any]]):
    """All blocks of a text, in order; each iteration reads the text again.

    A slice ``samples[n:]`` reads past the first `n` blocks and builds no samples of them.
    """

    def __init__(self, blocks: Callable[[], Iterator[list[int]]], build: Build, first: int = 0):
        self._blocks, self._build, self._first = blocks, build, first

    def __getitem__(self, index: slice) -> StreamedSamples:
        if index.stop is not None or index.step is not None or (index.start or 0) < 0:
            raise DataError(f"{index} of a stream of samples; expected samples[n:]")
        return StreamedSamples(self._blocks, self._build, self._first + (index.start or 0))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, block in enumerate(itertools.islice(self._blocks(), self._first, None), start=self._first):
            yield self._build(block, number)


@overload
def lm_samples(
    texts: Iterable[str], tokenizer: Any, *, objective: str, num_samples: int, max_length: int, seed: int = ...,
    rows: int | None = ..., progress: Callable[[int], None] | None = ...,
) -> DrawnSamples: ...  # fmt: skip
@overload
def lm_samples(
    texts: Iterable[str], tokenizer: Any, *, objective: str, num_samples: None, max_length: int, seed: int = ...,
    rows: int | None = ..., progress: Callable[[int], None] | None = ...,
) -> StreamedSamples: ...  # fmt: skip
def lm_samples(
    texts: Iterable[str],
    tokenizer: Any,
    *,
    objective: str,
    num_samples: int | None,
    max_length: int,
    seed: int = 0,
    rows: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> DrawnSamples | StreamedSamples:
    """Draw `num_samples` samples of up to `max_length` tokens from `texts`, or take all of them in order.

    Args:
        texts: paragraphs, in their order; blocks run across them.
        tokenizer: the model's own.
        objective: ``"mlm"``, ``"causal"`` or ``"seq2seq"``; see `corruption`.
        num_samples: how many; fewer come back where the text has fewer blocks. None for all, in the text's order.
        max_length: tokens per block, special tokens included.
        seed: draws the blocks and, with the sample's index, what is to be guessed.
        rows: of the model's token table; those of the tokenizer's tokens that are beyond are put into no sample.
        progress: called with the number of blocks read so far while samples are drawn.

    Returns:
        Samples with ``input_ids``, ``labels`` (−100 is no target) and ``index``; the same each time they are gone over.

    Raises:
        DataError: a number out of range, or no text.
        ModelError: a tokenizer without the tokens that the objective needs, or a model without rows for them.
    """
    if num_samples is not None and num_samples < 1:
        raise DataError(f"number of samples {num_samples}; expected at least 1")
    if seed < 0:
        raise DataError(f"seed {seed}; expected 0 or more")
    vocabulary = Vocabulary.of(tokenizer, rows)
    body = max_length - len(vocabulary.framed([]))
    if body < 2:
        raise DataError(f"max length {max_length}; expected at least {max_length - body + 2} tokens")

    def build(block: Sequence[int], index: int) -> dict[str, Any]:
        return corrupted(objective, block, vocabulary, seed, index)

    build(vocabulary.ordinary[:1].repeat(body).tolist(), 0)  # a tokenizer that does not suit comes up before the text
    if num_samples is None:
        return StreamedSamples(lambda: _blocks(texts, tokenizer, body), build)
    return DrawnSamples(_draw(_blocks(texts, tokenizer, body), num_samples, seed, progress), build)


def _draw(
    blocks: Iterator[list[int]], number: int, seed: int, progress: Callable[[int], None] | None
) -> list[np.ndarray]:
    """The blocks with the smallest random numbers, smallest first."""
    rng = np.random.default_rng([seed, 0])
    kept: list[tuple[float, int, np.ndarray]] = []  # a heap whose first has the largest number
    for place, block in enumerate(blocks):
        key = -rng.random()
        if len(kept) < number:
            heapq.heappush(kept, (key, place, np.asarray(block, dtype=np.int32)))
        elif key > kept[0][0]:
            heapq.heapreplace(kept, (key, place, np.asarray(block, dtype=np.int32)))
        if progress and place % 1000 == 999:
            progress(place + 1)
    return [block for *_, block in sorted(kept, key=lambda k: -k[0])]


def _blocks(texts: Iterable[str], tokenizer: Any, body: int) -> Iterator[list[int]]:
    """Token blocks of `body` tokens; a shorter last one is kept only where it is the only one."""
    rest: list[int] = []
    any_block = False
    for lines in _portions(texts):
        encoded = tokenizer(
            lines,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        rest.extend(itertools.chain.from_iterable(encoded))
        whole = len(rest) - len(rest) % body
        for start in range(0, whole, body):
            any_block = True
            yield rest[start : start + body]
        del rest[:whole]
    if not any_block:
        if not rest:
            raise DataError("the text has no tokens; expected some text")
        yield rest


def _portions(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lines, some `_PORTION` characters at a time."""
    lines: list[str] = []
    size = 0
    for text in texts:
        lines.append(text + "\n")
        size += len(text) + 1
        if size >= _PORTION:
            yield lines
            lines, size = [], 0
    if lines:
        yield lines
