"""Text → tokenised samples for a language model's own objective.

The text is cut into blocks of `max_length` tokens, special tokens included; the samples are drawn from the blocks
without replacement. What a masked LM has to guess is a function of (seed, sample index) alone.
"""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from guided_dropout.errors import DataError, ModelError
from guided_dropout.objectives import IGNORE

_OPENERS = {".xz": lzma.open, ".gz": gzip.open}
MASK_SHARE = 0.15


def read_text(path: str | Path) -> list[str]:
    """The non-empty lines of a UTF-8 text file (plain, ``.gz`` or ``.xz``), stripped.

    Raises:
        DataError: no such file, not UTF-8, or nothing in it.
    """
    path = Path(path)
    try:
        with _OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as f:
            lines = [line for line in (raw.strip() for raw in f) if line]
    except (OSError, EOFError, lzma.LZMAError) as e:
        reason = getattr(e, "strerror", None) or e
        raise DataError(f"cannot read the text {path}: {reason}; expected a text file (.txt, .gz, .xz)") from e
    except UnicodeDecodeError as e:
        raise DataError(f"{path} is not UTF-8 (byte {e.start}); expected UTF-8 text: convert it first") from e
    if not lines:
        raise DataError(f"{path} has no text; expected at least one line that is not blank")
    return lines


def lm_samples(
    texts: Iterable[str], tokenizer: Any, *, objective: str, num_samples: int, max_length: int, seed: int = 0
) -> list[dict[str, list[int]]]:
    """Draw `num_samples` samples of up to `max_length` tokens from `texts`.

    Args:
        texts: paragraphs, in their order; blocks run across them.
        tokenizer: the model's own.
        objective: ``"mlm"`` (15 % of the ordinary tokens are targets; of these 80 % become the mask token, 10 % a
            random token, 10 % stay) or ``"causal"`` (each token is a target).
        num_samples: how many; fewer come back where the text has fewer blocks.
        max_length: tokens per sample.
        seed: draws the blocks and, with the sample's index, the masks.

    Returns:
        Samples with ``input_ids`` and ``labels`` (−100 is no target).

    Raises:
        DataError: a number out of range, or no text.
        ModelError: a masked LM's tokenizer without a mask token.
    """
    if num_samples < 1:
        raise DataError(f"number of samples {num_samples}; expected at least 1")
    prefix, suffix = special_tokens(tokenizer)
    body = max_length - len(prefix) - len(suffix)
    if body < 2:
        raise DataError(f"max length {max_length}; expected at least {max_length - body + 2} tokens")
    blocks = _blocks(texts, tokenizer, body)
    if not blocks:
        raise DataError("the text has no tokens; expected some text")
    order = np.random.default_rng([seed, 0]).permutation(len(blocks))[:num_samples]
    rows = [[*prefix, *blocks[k], *suffix] for k in order]
    if objective == "causal":
        return [{"input_ids": row, "labels": list(row)} for row in rows]
    if objective == "mlm":
        return [mask_tokens(row, tokenizer, seed, i) for i, row in enumerate(rows)]
    raise DataError(f"no samples of text for objective {objective!r}; expected mlm or causal")


def mask_tokens(ids: Sequence[int], tokenizer: Any, seed: int, index: int) -> dict[str, list[int]]:
    """Mask 15 % of the ordinary tokens of sample number `index`, as BERT's pretraining does.

    Depends on nothing but its arguments: neither on the other samples nor on how they are batched.
    """
    if tokenizer.mask_token_id is None:
        raise ModelError(
            f"the tokenizer ({type(tokenizer).__name__}) has no mask token, which a masked LM needs; "
            "expected a masked LM's tokenizer: use --objective causal for a next-token model"
        )
    row = np.asarray(ids, dtype=np.int64)
    special = np.asarray(tokenizer.all_special_ids)
    rng = np.random.default_rng([seed, 1, index])
    target = (rng.random(len(row)) < MASK_SHARE) & ~np.isin(row, special)
    fate = rng.random(len(row))
    ordinary = np.setdiff1d(np.arange(len(tokenizer)), special)
    noise = rng.choice(ordinary, size=len(row))
    inputs = np.where(target & (fate < 0.8), tokenizer.mask_token_id, np.where(target & (fate >= 0.9), noise, row))
    return {"input_ids": inputs.tolist(), "labels": np.where(target, row, IGNORE).tolist()}


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that `tokenizer` puts before and after a text, found by encoding one."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    for i in range(len(full) - len(bare) + 1):
        if full[i : i + len(bare)] == bare:
            return full[:i], full[i + len(bare) :]
    return [], []


def _blocks(texts: Iterable[str], tokenizer: Any, body: int) -> list[list[int]]:
    """Token blocks of `body` tokens; a shorter last one is kept only where it is the only one."""
    lines = [t + "\n" for t in texts]
    if not lines:
        return []
    encoded = tokenizer(lines, add_special_tokens=False, verbose=False)["input_ids"]
    stream = [i for ids in encoded for i in ids]
    whole = [stream[s : s + body] for s in range(0, len(stream) - body + 1, body)]
    return whole or ([stream] if stream else [])
