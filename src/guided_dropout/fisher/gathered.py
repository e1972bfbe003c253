"""Whose the rows are that a model picks out of a batch, as a mixture of experts does with tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from guided_dropout.fisher.layout import Layout
from guided_dropout.fisher.narrow import Narrowed
from guided_dropout.fisher.operations import tensors_of

_PICKING = (Tensor.__getitem__, Tensor.index_select, torch.index_select)
# Operations whose every output row is made of the input row of the same number; by name, as functions and methods.
_ROW_BY_ROW = {
    *("linear", "addmm", "matmul", "mm", "layer_norm", "rms_norm", "dropout", "softmax", "chunk", "split", "unbind"),
    *("relu", "gelu", "silu", "sigmoid", "tanh", "softplus", "hardswish", "leaky_relu", "elu", "mish", "erf", "exp"),
    *("neg", "abs", "pow", "square", "sqrt", "rsqrt", "clamp", "clamp_min", "clamp_max", "minimum", "maximum", "where"),
    *("add", "sub", "mul", "div", "float", "double", "to", "type", "type_as", "contiguous", "clone"),
}


class GatheredRows:
    """Follows rows that were picked by number through operations that treat each row alike.

    Args:
        num_samples: B; what rows are picked from holds equally many of each sample, sample after sample.
        layout: of the targets, which is what rows are picked from where the model runs on them alone.
        narrowed: says where it does.
    """

    def __init__(self, num_samples: int, layout: Layout, narrowed: Narrowed):
        self._num_samples, self._layout, self._narrowed = num_samples, layout, narrowed
        self._owners: Any = WeakTensorKeyDictionary()

    def owners(self, tensors: Sequence[Tensor]) -> Tensor | None:
        """[R] int64, the sample that each row of these tensors belongs to; None where no rows were picked."""
        if not len(self._owners):
            return None
        return next((self._owners[t] for t in tensors if t in self._owners), None)

    def follow(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """Note what an operation does to picked rows."""
        if function in _PICKING and not kwargs and isinstance(out, Tensor):
            self._pick(args, out)
        if not len(self._owners) or function.__name__.strip("_") not in _ROW_BY_ROW:
            return
        inputs = tensors_of((args, kwargs))
        owners = self.owners(inputs)
        if owners is None:
            return
        # What else holds samples must hold the same rows.
        others = [t for t in inputs if t not in self._owners and t.requires_grad and t.shape[:1] == owners.shape]
        if not others:
            for t in tensors_of(out):
                if t.shape[:1] == owners.shape:
                    self._owners[t] = owners

    def _pick(self, args: Sequence[Any], out: Tensor) -> None:
        source, index = args[0], args[-1]
        if not source.requires_grad:  # a table, not samples
            return
        first = index[0] if isinstance(index, tuple) and index else index
        if first is Ellipsis or (isinstance(first, slice) and first == slice(None)):
            if source in self._owners and out.shape[:1] == source.shape[:1]:
                self._owners[out] = self._owners[source]
        elif isinstance(first, Tensor) and first.dim() == 1 and (owners := self._all_owners(source)) is not None:
            numbers = first.nonzero()[:, 0] if first.dtype == torch.bool else first
            if out.shape[:1] == numbers.shape:
                self._owners[out] = owners[numbers]

    def _all_owners(self, source: Tensor) -> Tensor | None:
        if source in self._owners:
            return self._owners[source]
        if self._narrowed.dim(source) == 0:
            return self._layout.owners(source.device)
        step, odd = divmod(len(source), self._num_samples)
        return None if odd else torch.arange(len(source), device=source.device) // step
