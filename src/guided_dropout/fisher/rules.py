"""One rule per kind of operation that takes parameters: how it is read, run, and differentiated per sample.

From the operation's input and its output's gradient a rule gives, for each of its parameters, a use (see `squares`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from guided_dropout.fisher.layout import Layout
from guided_dropout.fisher.squares import Outer, Rows, Sums, Use


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
        input_gradient: (Call, gradient rows [R, ·]) → the gradient of the input's rows [R, ·], for operations that
            treat each row alike; rows without a gradient are then left out of all products. None: autograd does it.
    """

    name: str
    bind: Callable[..., Call | None]
    run: Callable[[Call], Tensor]
    uses: Callable[[Call, Tensor, Layout], dict[str, Use]]
    input_gradient: Callable[[Call, Tensor], Tensor] | None = None


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


_LINEAR = Rule(
    "linear",
    _bind_linear,
    lambda c: F.linear(c.x, **c.parameters),
    _linear_uses,
    lambda c, g: g @ c.parameters["weight"],
)
_ADDMM = Rule(
    "addmm",
    _bind_addmm,
    lambda c: torch.addmm(c.parameters["bias"], c.x, c.parameters["weight"]),
    _addmm_uses,
    lambda c, g: g @ c.parameters["weight"].T,
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
