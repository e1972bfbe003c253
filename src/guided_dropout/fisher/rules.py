r"""Per-sample gradients of single operations: one rule per kind of operation that takes parameters.

A batch of B samples goes through an operation as R rows; `Layout` says which rows are whose. From the operation's input
and its output's gradient a rule gives, for each of its parameters, a *use*: the per-sample gradient in a compact form.

======================  ===========================================================
``Outer(left, right)``  :math:`\sum_{t} \text{left}_t\,\text{right}_t^\top` (Linear, Conv1D)
``Rows(ids, grads)``    row ``ids[t]`` gets ``grads[t]`` (Embedding)
``Sums(grads)``         :math:`\sum_{t} \text{grads}_t` (biases, LayerNorm, RMSNorm)
======================  ===========================================================

Sums run over the rows t of one sample. `add_squares` adds up a sample's uses of a parameter, squares, and sums over the
batch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# A tile of a matrix's gradient and one of its sum of squares fit a shared cache together (float32: 2 x 2 MB).
_TILE_ELEMENTS = 512 * 1024


@dataclass(frozen=True)
class Layout:
    """Which of R rows belong to which of B samples.

    Attributes:
        offsets: B+1 row numbers; sample b owns rows ``offsets[b]`` to ``offsets[b+1]``.
    """

    offsets: tuple[int, ...]

    @classmethod
    def even(cls, num_rows: int, num_samples: int) -> Layout:
        """Equally many rows for each sample, sample after sample."""
        step = num_rows // num_samples
        return cls(tuple(range(0, num_rows + 1, step)) if step else (0,) * (num_samples + 1))

    @property
    def num_samples(self) -> int:
        """B."""
        return len(self.offsets) - 1

    def owners(self, device: torch.device) -> Tensor:
        """[R] int64, the sample that each row belongs to."""
        counts = torch.tensor(self.offsets, device=device).diff()
        return torch.repeat_interleave(torch.arange(self.num_samples, device=device), counts)

    def sum_rows(self, rows: Tensor) -> Tensor:
        """[R, ...] → [B, ...], each sample's rows added up."""
        return rows.new_zeros(self.num_samples, *rows.shape[1:]).index_add_(0, self.owners(rows.device), rows)

    def spans(self) -> list[tuple[int, slice]]:
        """(sample, its rows) for each sample that has rows."""
        pairs = zip(self.offsets[:-1], self.offsets[1:], strict=True)
        return [(b, slice(s, e)) for b, (s, e) in enumerate(pairs) if e > s]


@dataclass(frozen=True)
class Outer:
    """A matrix's per-sample gradients as products of rows: left [R, m], right [R, n] → B gradients [m, n]."""

    left: Tensor
    right: Tensor
    layout: Layout

    def add_to(self, gradient: Tensor, sample: int) -> None:
        """Add sample `sample`'s gradient to `gradient` [m, n]."""
        rows = slice(self.layout.offsets[sample], self.layout.offsets[sample + 1])
        gradient.addmm_(self.left[rows].T.to(gradient.dtype), self.right[rows].to(gradient.dtype))


@dataclass(frozen=True)
class Rows:
    """A table's per-sample gradients by row: ids [R], grads [R, d] → B gradients [V, d], zero in all other rows."""

    ids: Tensor
    grads: Tensor
    layout: Layout

    def add_to(self, gradient: Tensor, sample: int) -> None:
        """Add sample `sample`'s gradient to `gradient` [V, d]."""
        rows = slice(self.layout.offsets[sample], self.layout.offsets[sample + 1])
        gradient.index_add_(0, self.ids[rows], self.grads[rows].to(gradient.dtype))


@dataclass(frozen=True)
class Sums:
    """A vector's per-sample gradients, added up over rows already: grads [B, d]."""

    grads: Tensor

    def add_to(self, gradient: Tensor, sample: int) -> None:
        """Add sample `sample`'s gradient to `gradient` [d]."""
        gradient.add_(self.grads[sample])


Use = Outer | Rows | Sums


def add_squares(total: Tensor, uses: Sequence[Use], num_samples: int) -> None:
    r"""``total`` += :math:`\sum_b (\sum_u g_{u,b})^2` over the B samples and the uses u of one parameter, in place."""
    outers = sum(isinstance(u, Outer) for u in uses)
    if all(isinstance(u, Sums) for u in uses):
        gradients = torch.stack([u.grads.to(total.dtype) for u in uses if isinstance(u, Sums)])
        total += gradients.sum(0).square_().sum(0)
    elif all(isinstance(u, Rows) for u in uses):
        _add_row_squares(total, [u for u in uses if isinstance(u, Rows)])
    elif isinstance(uses[0], Outer) and len(uses) == 1:
        _add_outer_squares(total, uses[0])
    elif outers == 1 and len(uses) == outers + sum(isinstance(u, Rows) for u in uses):
        _add_tied_squares(total, uses)
    else:
        gradient = torch.empty_like(total)
        for b in range(num_samples):
            gradient.zero_()
            for u in uses:
                u.add_to(gradient, b)
            total.addcmul_(gradient, gradient)


def _add_outer_squares(total: Tensor, use: Outer) -> None:
    """Tile by tile, so that a tile's product and its sum of squares stay in the cache for the whole batch."""
    left, right = use.left.to(total.dtype), use.right.to(total.dtype)
    step = max(1, _TILE_ELEMENTS // total.shape[1])
    spans = use.layout.spans()
    buffer = torch.empty_like(total[:step])
    for start in range(0, total.shape[0], step):
        tile = total[start : start + step]
        gradient = buffer[: len(tile)]
        for _, rows in spans:
            torch.mm(left[rows, start : start + step].T, right[rows], out=gradient)
            tile.addcmul_(gradient, gradient)


def _add_tied_squares(total: Tensor, uses: Sequence[Use]) -> None:
    r"""A table that is looked up and multiplied by: :math:`(D+E)^2 = D^2 + (2D + E)E`, and E is zero in most rows."""
    (outer,) = (u for u in uses if isinstance(u, Outer))
    _add_outer_squares(total, outer)
    samples, ids, sums = _touched_rows(total, [u for u in uses if isinstance(u, Rows)])
    left, right = outer.left.to(total.dtype), outer.right.to(total.dtype)
    for b, rows in outer.layout.spans():
        mine = samples == b
        crossed = left[rows].index_select(1, ids[mine]).T @ right[rows]
        total.index_add_(0, ids[mine], 2 * crossed * sums[mine])
    total.index_add_(0, ids, sums.square())


def _add_row_squares(total: Tensor, uses: Sequence[Rows]) -> None:
    _, ids, sums = _touched_rows(total, uses)
    total.index_add_(0, ids, sums.square_())


def _touched_rows(total: Tensor, uses: Sequence[Rows]) -> tuple[Tensor, Tensor, Tensor]:
    """(sample [K], row [K], gradient [K, d]) of the K (sample, row) pairs that the uses touch."""
    num_rows = total.shape[0]
    keys = torch.cat([u.ids + num_rows * u.layout.owners(u.ids.device) for u in uses])
    grads = torch.cat([u.grads for u in uses]).to(total.dtype)
    touched, where = torch.unique(keys, return_inverse=True)
    sums = grads.new_zeros(len(touched), grads.shape[1]).index_add_(0, where, grads)
    return touched // num_rows, touched % num_rows, sums


@dataclass
class Call:
    """An operation that takes parameters, its arguments sorted.

    Attributes:
        x: the operand that carries the samples.
        parameters: role → tensor.
        options: whatever else the operation takes.
    """

    x: Tensor
    parameters: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rule:
    """How one kind of operation is read, run and differentiated per sample.

    Attributes:
        bind: the operation's own arguments → Call, or None where this form of it has no rule.
        run: Call → output.
        uses: (Call, gradient rows [R, ·], Layout) → role → Use.
    """

    name: str
    bind: Callable[..., Call | None]
    run: Callable[[Call], Tensor]
    uses: Callable[[Call, Tensor, Layout], dict[str, Use]]


def as_rows(x: Tensor) -> Tensor:
    """[..., d] → [R, d]."""
    return x.reshape(-1, x.shape[-1])


def _given(**tensors: Tensor | None) -> dict[str, Tensor]:
    return {role: t for role, t in tensors.items() if t is not None}


# F.linear(x, weight [out, in], bias [out])
def _bind_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Call:  # noqa: A002
    return Call(input, _given(weight=weight, bias=bias))


def _linear_uses(call: Call, g: Tensor, layout: Layout) -> dict[str, Use]:
    return {"weight": Outer(g, as_rows(call.x), layout), "bias": Sums(layout.sum_rows(g))}


# torch.addmm(bias [out], x [R, in], weight [in, out]): transformers' Conv1D
def _bind_addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Call | None:  # noqa: A002
    return Call(mat1, {"bias": input, "weight": mat2}) if beta == alpha == 1 and input.dim() == 1 else None


def _addmm_uses(call: Call, g: Tensor, layout: Layout) -> dict[str, Use]:
    return {"weight": Outer(call.x, g, layout), "bias": Sums(layout.sum_rows(g))}


# F.embedding(ids, weight [V, d])
def _bind_embedding(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Call | None:
    if max_norm is not None or scale_grad_by_freq:
        return None
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    return Call(input, {"weight": weight}, {"padding_idx": padding_idx})


def _embedding_uses(call: Call, g: Tensor, layout: Layout) -> dict[str, Use]:
    ids = call.x.reshape(-1)
    if (pad := call.options["padding_idx"]) is not None:  # its row gets no gradient, as in autograd
        g = g * (ids != pad)[:, None]
    return {"weight": Rows(ids, g, layout)}


# F.layer_norm / F.rms_norm over the last dimension
def _bind_norm(
    input: Tensor,  # noqa: A002
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-5,
) -> Call | None:
    if len(normalized_shape) != 1:
        return None
    return Call(input, _given(weight=weight, bias=bias), {"shape": tuple(normalized_shape), "eps": eps})


def _bind_rms_norm(
    input: Tensor,  # noqa: A002
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Call | None:
    return _bind_norm(input, normalized_shape, weight, None, eps)


def _norm_rule(name: str, normalise: Callable[..., Tensor], bind: Callable[..., Call | None]) -> Rule:
    def run(call: Call) -> Tensor:
        return normalise(call.x, call.options["shape"], **call.parameters, eps=call.options["eps"])

    def uses(call: Call, g: Tensor, layout: Layout) -> dict[str, Use]:
        unit = as_rows(normalise(call.x, call.options["shape"], eps=call.options["eps"]))
        return {"weight": Sums(layout.sum_rows(g * unit)), "bias": Sums(layout.sum_rows(g))}

    return Rule(name, bind, run, uses)


# weight [d] * x [..., d] and x + bias: hand-written RMSNorms, LayerScale, stray biases
def _bind_elementwise(a: Any, b: Any, *, alpha: float = 1) -> Call | None:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or alpha != 1:
        return None
    vector, x = (a, b) if a.dim() == 1 else (b, a)
    if vector.dim() != 1 or x.dim() < 2 or vector.shape[0] != x.shape[-1]:
        return None
    return Call(x, {"vector": vector})


def _scale_uses(call: Call, g: Tensor, layout: Layout) -> dict[str, Use]:
    return {"vector": Sums(layout.sum_rows(g * as_rows(call.x)))}


def _shift_uses(call: Call, g: Tensor, layout: Layout) -> dict[str, Use]:
    return {"vector": Sums(layout.sum_rows(g))}


_LINEAR = Rule("linear", _bind_linear, lambda c: F.linear(c.x, **c.parameters), _linear_uses)
_ADDMM = Rule(
    "addmm", _bind_addmm, lambda c: torch.addmm(c.parameters["bias"], c.x, c.parameters["weight"]), _addmm_uses
)
EMBEDDING = Rule(
    "embedding",
    _bind_embedding,
    lambda c: F.embedding(c.x, c.parameters["weight"], c.options["padding_idx"]),
    _embedding_uses,
)
_SCALE = Rule("scale", _bind_elementwise, lambda c: c.x * c.parameters["vector"], _scale_uses)
_SHIFT = Rule("shift", _bind_elementwise, lambda c: c.x + c.parameters["vector"], _shift_uses)

RULES: dict[Any, Rule] = {
    F.linear: _LINEAR,
    torch.addmm: _ADDMM,
    F.embedding: EMBEDDING,
    F.layer_norm: _norm_rule("layer_norm", F.layer_norm, _bind_norm),
    F.rms_norm: _norm_rule("rms_norm", F.rms_norm, _bind_rms_norm),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, operator.mul), _SCALE),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, operator.add), _SHIFT),
}
