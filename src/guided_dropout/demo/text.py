"""English prose that every Python brings along: the help topics of its own interpreter, without code and tables.

The text differs a little between Python versions; `text_digest` tells which one a result was made on.
"""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Sequence
from functools import cache

from guided_dropout.errors import DataError

_MARKER = re.compile(r"^(?:[*\-]|\d+\.|\[\d+\]|\(\d+\))\s+")
_NOT_PROSE = re.compile(r"::=|>>>|[=\-+]{3}|\|\s|\s\|")
_SENTENCE_BREAK = re.compile(r"(?<=[.?!])\s+(?=[A-Z])")
_PLAIN_SENTENCE = re.compile(r"[A-Z][A-Za-z0-9 ,;:'’()\-]*[.?!]")
_MARKUP = re.compile(r'"+([^"]*)"+|\*+([^*]+)\*+')
_FEWEST_SENTENCES = 1000


@cache
def demo_paragraphs() -> tuple[str, ...]:
    """Paragraphs of prose, each in one line, none twice, in the order of the topics' names.

    Raises:
        DataError: this Python has no help topics.
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as e:
        raise DataError(
            "this Python has no pydoc_data.topics, the demo's text; expected a full CPython: give a text file instead"
        ) from e
    blocks = (block for name in sorted(topics) for block in re.split(r"\n\s*\n", topics[name]))
    paragraphs = (_MARKER.sub("", " ".join(block.split())) for block in blocks)
    return tuple(dict.fromkeys(p for p in paragraphs if _is_prose(p)))


@cache
def demo_sentences() -> tuple[str, ...]:
    """Sentences of 6 to 30 words without markup, none twice (capitals aside), in the order of the paragraphs.

    Raises:
        DataError: as for `demo_paragraphs`, or hardly any sentence in them.
    """
    found: dict[str, str] = {}
    for paragraph in demo_paragraphs():
        for sentence in _SENTENCE_BREAK.split(_MARKUP.sub(r"\1\2", paragraph)):
            if _PLAIN_SENTENCE.fullmatch(sentence) and 6 <= len(sentence.split()) <= 30:
                found.setdefault(sentence.lower(), sentence)
    if len(found) < _FEWEST_SENTENCES:
        raise DataError(
            f"only {len(found)} sentences in this Python's help topics; expected at least {_FEWEST_SENTENCES}: "
            "use another CPython"
        )
    return tuple(found.values())


def text_digest(texts: Sequence[str]) -> str:
    """First 16 hexadecimal digits of the SHA-256 of the texts, one a line."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def _is_prose(text: str) -> bool:
    """A capital letter at the start, a full stop at the end, some words between, and no traces of code or tables."""
    return (
        len(text.split()) >= 8
        and re.match(r"[A-Z\"*(]", text) is not None
        and re.search(r"[.!?:][\")]?$", text) is not None
        and _NOT_PROSE.search(text) is None
    )
