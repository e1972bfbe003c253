"""What a sample is: a mapping of 1-D sequences, looked at before any work is done on it.

A sample holds ``input_ids`` and ``labels``, and where the model takes them ``attention_mask``, ``token_type_ids`` and
``decoder_*``. Its labels are one token for each place (−100 is no target), or for a sequence classifier one number: an
integer class, or a score for a regression. ``index`` is its number in the stream: what is drawn at random for a sample
depends on that, not on the batch that it stands in.

Where ``position_ids`` begin anew and there is no mask, a sample is several texts that do not see each other, as
transformers runs it without a cache.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from guided_dropout.errors import DataError, ModelError
from guided_dropout.models import positions_of

IGNORE = -100
INDEX = "index"
# What transformers calls the table of a model that looks its positions up.
_POSITION_TABLES = ("position_embeddings", "embed_positions", "positions_embed", "wpe")

Sample = Mapping[str, Any]


def check_samples(model: nn.Module, samples: Iterable[Sample], *, first: int = 0) -> Iterator[dict[str, Any]]:
    """Yield samples as tensors after a look at their form; the first bad one is named by its index.

    Args:
        model: whose inputs, vocabulary, classes and positions they must fit.
        samples: their ``index`` is kept, and counted where there is none.
        first: the index of the first one.

    Yields:
        Samples of int64 tensors [T] and ``index``; one number as labels is a 0-dimensional tensor, int64 or float64.

    Raises:
        DataError: a sample that is no mapping, is empty, whose sequences differ in length or are none, that holds keys
            that the model does not take or other ones than the first, more tokens than there are positions, a token
            beyond the vocabulary, a label beyond the classes, a mask that leaves out everything or an index that is
            no number of a sample.
    """
    vocabulary, taken, positions = vocabulary_size(model), accepted(model), _positions(model)
    decoded = _decoded_vocabulary(model, vocabulary)
    encodes_and_decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    keys: set[str] = set()
    for i, s in enumerate(samples, start=first):
        if not isinstance(s, Mapping) or "input_ids" not in s or "labels" not in s:
            found = sorted(s) if isinstance(s, Mapping) else type(s).__name__
            raise DataError(f"sample {i} holds {found}; expected a mapping with input_ids and labels")
        _check_keys(model, i, s, taken)
        own = set(s) - {INDEX}
        if "position_ids" not in s:
            own -= {"attention_mask"}  # it is all ones where it is not given
        if own != (keys := keys or own):
            odd = sorted(own ^ keys)[0]
            where = f"sample {i}" if odd in own else f"sample {first}"
            raise DataError(
                f"only {where} of samples {first} and {i} holds {odd}; expected the same keys in all samples"
            )
        try:
            tensors = {name: as_tensor(name, value) for name, value in s.items() if name != INDEX}
        except DataError as e:
            raise DataError(f"sample {i}: {e}") from e
        labels, length = tensors["labels"], len(tensors["input_ids"])
        if length == 0 or labels.numel() == 0:
            raise DataError(f"sample {i} is empty; expected at least one token and one label: leave it out")
        per_token = {"attention_mask", "token_type_ids", "position_ids"} & set(s)
        if labels.dim() and not encodes_and_decodes:
            per_token.add("labels")
        for name in sorted(per_token):
            if len(tensors[name]) != length:
                raise DataError(f"sample {i} has {len(tensors[name])} {name} for {length} input_ids; expected as many")
        for name in ("decoder_input_ids", "decoder_attention_mask") if labels.dim() and encodes_and_decodes else ():
            if name in tensors and len(tensors[name]) != len(labels):
                raise DataError(
                    f"sample {i} has {len(tensors[name])} {name} for {len(labels)} labels; expected as many"
                )
        for name in ("input_ids", "labels") if labels.dim() else ("input_ids",):
            _check_length(model, i, name, tensors, positions)
            _check_tokens(model, i, name, tensors[name], vocabulary if name == "input_ids" else decoded)
        if not labels.dim():
            _check_label(model, i, labels.item())
        _check_mask(i, tensors)
        if "position_ids" in tensors and "attention_mask" in taken and not _begins_anew(tensors["position_ids"]):
            tensors.setdefault("attention_mask", torch.ones_like(tensors["input_ids"]))  # so that it is not packed
        yield {**tensors, INDEX: _index(i, s)}


def as_tensor(name: str, value: Any) -> Tensor:
    """A sequence as int64 tensor [T]; ``labels`` may be one number, int64 or float64, as tensor [].

    Raises:
        DataError: neither.
    """
    try:
        out = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as e:
        found = f"a {type(value).__name__}, {repr(value)[:40]}" if value is not None else "None"
        raise DataError(
            f"{name} is no sequence of integers, but {found} ({e}); expected one dimension of integers"
            f"{', or one number' if name == 'labels' else ''}: tokenise it, or leave the sample out"
        ) from e
    if name == "labels" and out.dim() == 0:
        return out.double() if out.is_floating_point() else out.long()
    if out.dim() != 1 or (out.is_floating_point() and out.numel()):
        advice = "give single samples, without a dimension for a batch" if out.dim() > 1 else "give token numbers"
        raise DataError(
            f"{name} has shape {tuple(out.shape)} and type {out.dtype}; expected one dimension of integers: {advice}"
        )
    return out.long()


def is_packed(sample: Sample) -> bool:
    """Whether a sample that `check_samples` gave is several texts, which a mask, even one of ones, would make one."""
    return "position_ids" in sample and "attention_mask" not in sample


def _begins_anew(positions: Tensor) -> bool:
    return bool((positions.diff() != 1).any())


def vocabulary_size(model: nn.Module) -> int:
    """How many tokens the model knows.

    Raises:
        ModelError: it is no model of transformers, or looks its tokens up in no table, or in several.
    """
    if not hasattr(model, "get_input_embeddings"):
        raise ModelError(
            f"{type(model).__name__} is no model of transformers; expected a PreTrainedModel, whose Fisher is measured "
            "by its own loss: wrap it in one (`find_sites(model, inputs=…)` and rates do without)"
        )
    try:
        embeddings: Any = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
        return embeddings.weight.shape[0]
    except (NotImplementedError, AttributeError) as e:  # what transformers answers then
        raise ModelError(
            f"{type(model).__name__} has no table of its tokens; expected a model that looks them up in one: choose "
            "another"
        ) from e


def _decoded_vocabulary(model: Any, vocabulary: int) -> int:
    """How many tokens a decoder tells apart, which may be others than its encoder reads."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return vocabulary
    weight = getattr(model.get_output_embeddings(), "weight", None)
    return vocabulary if weight is None else weight.shape[0]


def accepted(model: nn.Module) -> list[str]:
    """Names of what the model is called with; none where a wrapper passes on whatever it gets."""
    names = list(inspect.signature(model.forward).parameters)
    return names if "input_ids" in names else []


def _positions(model: Any) -> int | None:
    """The rows of the model's table of positions; None where it has none, as with rotary ones, or one that grows."""
    if not hasattr(model, "config"):
        return None
    for name, module in model.named_modules():
        grows = hasattr(module, "make_weight")  # FSMT's
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _POSITION_TABLES and not grows:
            return positions_of(model)
    return None


def _check_keys(model: nn.Module, i: int, sample: Sample, accepted: list[str]) -> None:
    odd = [name for name in sample if name not in (*accepted, "labels", INDEX)]
    if accepted and odd:
        raise DataError(
            f"sample {i} holds {odd[0]!r}, which {type(model).__name__} does not take; expected some of "
            f"{', '.join(k for k in accepted if k.endswith(('ids', 'mask', 'labels')))}: rename or drop it"
        )


def _check_length(model: nn.Module, i: int, name: str, tensors: Mapping[str, Tensor], positions: int | None) -> None:
    # Positions that are given may begin anew within a sample.
    if positions is not None and len(tensors[name]) > positions and "position_ids" not in tensors:
        raise DataError(
            f"sample {i} has {len(tensors[name])} {name}; expected at most {positions}, the positions of "
            f"{type(model).__name__}: cut it (a tokenizer does with truncation=True, max_length={positions})"
        )


def _check_tokens(model: nn.Module, i: int, name: str, tokens: Tensor, vocabulary: int) -> None:
    bad = (tokens < 0) | (tokens >= vocabulary)
    if name == "labels":
        bad &= tokens != IGNORE
    if bad.any():
        raise DataError(
            f"sample {i} has {int(tokens[bad][0])} in its {name}; expected 0 to {vocabulary - 1}, the vocabulary of "
            f"{type(model).__name__}, or {IGNORE} for no target: use the model's own tokenizer"
        )


def _index(i: int, sample: Sample) -> int:
    given = sample.get(INDEX, i)
    try:
        number = operator.index(given)
    except TypeError:
        number = -1
    if number < 0:
        raise DataError(f"sample {i} has the index {given!r}; expected a whole number from 0, or none: leave it out")
    return number


def _check_mask(i: int, tensors: Mapping[str, Tensor]) -> None:
    if "attention_mask" in tensors and not tensors["attention_mask"].any():
        raise DataError(
            f"sample {i} has an attention_mask that is zero for all of its tokens; expected some that "
            "are seen: leave the sample out"
        )


def _check_label(model: nn.Module, i: int, label: float) -> None:
    classes = getattr(getattr(model, "config", None), "num_labels", None) or 1
    if not math.isfinite(label):
        raise DataError(f"sample {i} has the label {label}; expected a finite number: leave it out")
    if classes > 1 and (isinstance(label, float) or (label != IGNORE and not 0 <= label < classes)):
        raise DataError(
            f"sample {i} has the label {label}; expected an integer from 0 to {classes - 1}, the classes of "
            f"{type(model).__name__}, or {IGNORE} for no target"
        )
