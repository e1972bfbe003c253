"""Whose the rows are that a model picks out of a batch, as a mixture of experts does with tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from guided_dropout.fisher.layout import Layout
from guided_dropout.fisher.narrow import Narrowed
from guided_dropout.fisher.operations import tensors_of
from guided_dropout.objectives import Batch

# By name, as functions and methods. What picks rows, by numbers that may depend on what the samples say;
_PICKING = {"getitem", "index_select", "gather", "take_along_dim", "masked_select", "take", "embedding"}
# what puts rows into a tensor that has an order of its own;
_PUTTING = {
    "setitem",
    "index_add",
    "index_copy",
    "index_put",
    "scatter",
    "scatter_add",
    "scatter_reduce",
    "masked_scatter",
}
# and what takes a shape from a tensor, and nothing else.
_FRESH = {"empty_like", "zeros_like", "ones_like", "full_like", "new_empty", "new_zeros", "new_ones", "new_full"}
# Operations whose every output row is made of the input row of the same number.
_ROW_BY_ROW = {
    *("linear", "addmm", "matmul", "mm", "layer_norm", "rms_norm", "dropout", "softmax", "chunk", "split", "unbind"),
    *("relu", "gelu", "silu", "sigmoid", "tanh", "softplus", "hardswish", "leaky_relu", "elu", "mish", "erf", "exp"),
    *("neg", "abs", "pow", "square", "sqrt", "rsqrt", "clamp", "clamp_min", "clamp_max", "minimum", "maximum", "where"),
    *("add", "sub", "mul", "div", "float", "double", "to", "type", "type_as", "contiguous", "clone"),
}
_RESHAPING = {"reshape", "view", "flatten", "squeeze", "unsqueeze"}


class GatheredRows:
    """Follows rows that were picked by number through operations that treat each row alike.

    After any other operation it is not known whose they are: they are *lost*, until they are put into a tensor that has
    an order of its own.

    Args:
        batch: what rows are picked from holds equally many of each of its samples, sample after sample.
        tables: parameters and buffers, of which no row belongs to a sample.
        layout: of the targets, which is what rows are picked from where the model runs on them alone.
        narrowed: says where it does.
    """

    def __init__(self, batch: Batch, tables: Iterable[Tensor], layout: Layout, narrowed: Narrowed):
        self._num_samples, self._layout, self._narrowed = len(batch), layout, narrowed
        self._tables = {id(t) for t in tables}
        self._shapes = {tuple(t.shape[:2]) for t in batch.inputs.values() if t.dim() > 1}
        self._owners: Any = WeakTensorKeyDictionary()
        self._lost: Any = WeakTensorKeyDictionary()

    def owners(self, tensors: Sequence[Tensor]) -> Tensor | None:
        """[R] int64, the sample that each row of these tensors belongs to; None where no rows were picked."""
        if not len(self._owners):
            return None
        return next((self._owners[t] for t in tensors if t in self._owners), None)

    def has_lost(self, tensors: Sequence[Tensor]) -> bool:
        """Whether one of them holds picked rows of which nobody knows whose they are."""
        return bool(len(self._lost)) and any(t in self._lost for t in tensors)

    def follow(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """Note what an operation does to picked rows."""
        name = function.__name__.strip("_")
        if name in _FRESH:
            return
        if name in _PICKING and isinstance(out, Tensor):
            self._pick(name, args, kwargs, out)
        elif name in _PUTTING:
            self._inherit(args[:1], out)
        elif len(self._owners) or len(self._lost):
            inputs = tensors_of((args, kwargs))
            owners = self.owners(inputs)
            # What else holds samples must hold the same rows.
            others = [t for t in inputs if t not in self._owners and t.requires_grad]
            if owners is not None and any(leading_ones(t, len(owners)) is not None for t in others):
                owners = None
            if name in _RESHAPING and owners is not None:
                owners = _reshaped(owners, args[0], out)
            if name in _ROW_BY_ROW | _RESHAPING and owners is not None and not self.has_lost(inputs):
                self._own(out, owners)
            else:
                self._inherit(inputs, out)

    def _own(self, out: Any, owners: Tensor) -> None:
        for t in tensors_of(out):
            if leading_ones(t, len(owners)) is not None:
                self._owners[t] = owners
            elif t.is_floating_point():
                self._lost[t] = True

    def _inherit(self, inputs: Sequence[Any], out: Any) -> None:
        """Lost is what is made of picked rows in a way that does not show whose they are then."""
        if any(t in self._owners or t in self._lost for t in tensors_of(inputs)):
            of_numbers = any(t in self._lost and not t.is_floating_point() for t in tensors_of(inputs))
            for t in tensors_of(out):
                if (t.is_floating_point() or of_numbers) and t not in self._owners:
                    self._lost[t] = True

    def _pick(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
        source = args[1] if name == "embedding" and len(args) > 1 else args[0]
        if not isinstance(source, Tensor):
            return
        if name == "embedding" and any(args[0] in known for known in (self._owners, self._lost)):  # picked numbers
            owners = None if args[0] in self._lost else self._owners[args[0]]
            if owners is None or leading_ones(out, len(owners)) is None:
                self._lost[out] = True
            else:
                self._owners[out] = owners
            return
        numbers = _numbers(name, args, kwargs)
        followed = source.requires_grad or source in self._owners or source in self._lost
        # A mask of attention is looked up by numbers of many dimensions.
        is_mask = name == "getitem" and not isinstance(numbers, Tensor)
        if not followed and (is_mask or not self._is_of_samples(source)):
            return  # a table, not samples
        if isinstance(numbers, Tensor):
            owners = None if source in self._lost else self._all_owners(source)
            if owners is not None:
                owners = owners[numbers.to(owners.device)]
            if owners is not None and leading_ones(out, len(owners)) is not None:
                self._owners[out] = owners
            else:
                self._lost[out] = True
        elif numbers == "same" and source in self._owners:
            self._own(out, self._owners[source])
        elif numbers != "lost":
            self._inherit([source], out)
        else:
            self._lost[out] = True

    def _is_of_samples(self, source: Tensor) -> bool:
        """Of what needs no gradient, as the tokens themselves, or hidden states before all that was chosen."""
        if self._num_samples == 1 or id(source) in self._tables or source.dtype == torch.bool:
            return False
        return tuple(source.shape[:2]) in self._shapes or len(source) in {b * t for b, t in self._shapes}

    def _all_owners(self, source: Tensor) -> Tensor | None:
        if source in self._owners:
            return self._owners[source]
        if self._narrowed.dim(source) == 0:
            return self._layout.owners(source.device)
        step, odd = divmod(len(source), self._num_samples)
        return None if odd else torch.arange(len(source), device=source.device) // step


def leading_ones(t: Tensor, rows: int) -> int | None:
    """How many dimensions of size 1 come before the `rows` rows of a tensor; None where it has other rows."""
    for number, size in enumerate(t.shape):
        if size == rows:
            return number
        if size != 1:
            return None
    return None


def _reshaped(owners: Tensor, before: Tensor, after: Tensor) -> Tensor | None:
    """Whose the rows are then: the same, or of so many that follow one another and are of one sample."""
    rows = len(owners)
    a, b = leading_ones(before, rows), leading_ones(after, rows)
    if a is not None and b is not None and (rows == 1 or before.shape[a:] == after.shape[b:]):
        return owners
    if a is None or not after.dim() or not len(after) or rows % len(after):
        return None
    grouped = owners.view(len(after), -1)
    whole = after.shape[1:2] == grouped.shape[1:] and before.shape[a + 1 :] == after.shape[2:]
    return grouped[:, 0] if whole and bool((grouped == grouped[:, :1]).all()) else None


def _numbers(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | str:
    """[R] int64, the rows that are picked; "same" where each row stays, "part" of what is there, or "lost"."""
    if name == "getitem":
        return _of_index(args[1])
    if name == "embedding":
        return args[0] if args[0].dim() == 1 else "lost"
    if name in ("index_select", "gather"):
        given = dict(zip(("dim", "index"), args[1:], strict=False)) | dict(kwargs)
    elif name == "take_along_dim":
        given = dict(zip(("index", "dim"), args[1:], strict=False)) | dict(kwargs)
    else:
        return "lost"
    dim = given.get("dim")
    if dim is not None and dim % args[0].dim():
        return "same"
    return given["index"] if name == "index_select" and dim is not None else "lost"


def _of_index(index: Any) -> Tensor | str:
    parts = [part for part in (index if isinstance(index, tuple) else (index,)) if part is not None]
    first = parts[0] if parts else Ellipsis
    if first is Ellipsis or (isinstance(first, slice) and first == slice(None)):
        return "same"
    if isinstance(first, list):
        first = torch.as_tensor(first)
    if not isinstance(first, Tensor):
        return "part"
    if first.dim() and first.dtype == torch.bool:
        return first.nonzero()[:, 0]
    return first if first.dim() == 1 else "lost"
