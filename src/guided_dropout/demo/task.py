"""A labelled task made by rule: is this sentence as it was written, or were some neighbouring words of it swapped?

"Return a copy of the given string unchanged." becomes, for instance, "Return copy a of given the string unchanged."

No annotation is needed, the classes are balanced exactly, and word counts tell nothing, since every sentence occurs
once as written and once swapped. It is a toy: it shows the workflow and stands for no task that anybody cares about.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from guided_dropout.data.tasks import Examples, Task
from guided_dropout.demo.text import demo_sentences, text_digest
from guided_dropout.errors import DataError

MOST_SWAPS = 3

SWAPPED_WORDS = Task("swapped-words", labels=("as written", "swapped"), metrics=("accuracy", "matthews_correlation"))


def swapped_words(
    *, num_train: int = 400, num_validation: int = 200, seed: int = 0, sentences: Sequence[str] | None = None
) -> tuple[Examples, Examples]:
    """Training and validation examples of `SWAPPED_WORDS`.

    Sentences are dealt to the splits before any is changed, so that neither a sentence nor its twin is in both.

    Args:
        num_train: sentences in the training split; it has twice as many examples.
        num_validation: likewise.
        seed: deals the sentences, draws the swaps and the order.
        sentences: to make the task of; the demo's own if None. Those without such a pair are left out.

    Raises:
        DataError: there are too few sentences.
    """
    rng = np.random.default_rng(seed)
    pool = [s for s in (demo_sentences() if sentences is None else sentences) if _swappable(s.split())]
    if len(pool) < num_train + num_validation:
        raise DataError(
            f"found {len(pool)} sentences that can be swapped; expected {num_train} for training and {num_validation} "
            "for validation: ask for fewer"
        )
    dealt = [pool[i] for i in rng.permutation(len(pool))]
    source = f"pydoc_data.topics, {text_digest(pool)}, seed {seed}"
    train = _examples(dealt[:num_train], rng, f"{source}, training")
    return train, _examples(dealt[num_train : num_train + num_validation], rng, f"{source}, validation")


def swap_words(sentence: str, rng: np.random.Generator) -> str:
    """Exchange up to three pairs of neighbouring words of `sentence`, drawn by `rng`; no word moves twice.

    Paired words differ in more than capitals. The first and the last word stay, and so do words with punctuation:
    capitals and full stops give nothing away.

    Raises:
        DataError: the sentence has no such pair.
    """
    words = sentence.split()
    places = _swappable(words)
    if not places:
        raise DataError(f"no two words to swap in {sentence!r}; expected two neighbours that differ inside it")
    swapped: set[int] = set()
    for i in rng.permutation(places).tolist():
        if len(swapped) < MOST_SWAPS and not swapped & {i - 1, i, i + 1}:
            words[i], words[i + 1] = words[i + 1], words[i]
            swapped.add(i)
    return " ".join(words)


def _swappable(words: Sequence[str]) -> list[int]:
    """Each i such that words i and i + 1, neither of them first or last, can be swapped."""
    return [
        i
        for i in range(1, len(words) - 2)
        if words[i].isalpha() and words[i + 1].isalpha() and words[i].lower() != words[i + 1].lower()
    ]


def _examples(sentences: Sequence[str], rng: np.random.Generator, source: str) -> Examples:
    labelled = [((text,), label) for s in sentences for label, text in enumerate((s, swap_words(s, rng)))]
    order = rng.permutation(len(labelled))
    return Examples([labelled[i][0] for i in order], [labelled[i][1] for i in order], source)
