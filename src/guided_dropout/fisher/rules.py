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

from guided_dropout.fisher import native
from guided_dropout.fisher.layout import Layout
from guided_dropout.fisher.products import is_plain, linear, times
from guided_dropout.fisher.squares import Outer, Rows, Sums, Use


@dataclass
class Call:
    """An operation that takes parameters, its arguments sorted.

    Attributes:
        x: the operand that carries the samples.
        parameters: role → tensor.
        options: whatever else the operation takes.
        batch_dim: the dimension of x along which the samples lie; in `Rule.uses`, where it was before it was moved.
    """

    x: Tensor
    parameters: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    batch_dim: int = 0


@dataclass(frozen=True)
class Rule:
    """How one kind of operation is read, run and differentiated per sample.

    Attributes:
        bind: the operation's own arguments → Call, or None where this form of it has no rule.
        run: Call → output.
        uses: (Call, gradient rows [R, ·], Layout) → role → Use.
        input_gradient: parameters → the matrix by which a gradient's rows [R, ·] give those of the input's [R, ·], for
            operations that treat each row alike; rows without a gradient are then left out of all products. None:
            autograd does it.
        like_x: (Call, gradient) → the gradient with its dimensions in the order of the call's ``x``.
        mirrored: `bind` for the form with the parameter first and the samples second.
        by_rows: False where `uses` wants x and the gradient whole, with the samples along their first dimension, and
            the Layout of that dimension.
    """

    name: str
    bind: Callable[..., Call | None]
    run: Callable[[Call], Tensor]
    uses: Callable[[Call, Tensor, Layout], dict[str, Use]]
    input_gradient: Callable[[dict[str, Tensor]], Tensor] | None = None
    like_x: Callable[[Call, Tensor], Tensor] = lambda call, g: g
    mirrored: Callable[..., Call | None] | None = None
    by_rows: bool = True

    def repeats_along(self, call: Call) -> Callable[[int], bool]:
        """Says of a dimension of the call's x whether each parameter is the same all along it, as a rule needs."""
        x, by_rows, elementwise = call.x, self.by_rows, "p" in call.parameters and not self.by_rows
        sizes = [[1] * (x.dim() - p.dim()) + list(p.shape) for p in call.parameters.values()]
        last = x.dim() - (x.is_floating_point() and by_rows)

        def repeats(dim: int) -> bool:
            return dim < last and (not elementwise or all(size[dim] == 1 for size in sizes))

        return repeats


def as_rows(x: Tensor) -> Tensor:
    """[..., d] → [R, d]; d may be 0."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _given(**tensors: Tensor | None) -> dict[str, Tensor]:
    return {role: t for role, t in tensors.items() if t is not None}


# F.linear(x, weight [out, in], bias [out])
def _bind_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Call | None:  # noqa: A002
    if weight.dim() != 2 or input.dim() < 2 or (bias is not None and bias.shape != weight.shape[:1]):
        return None
    return Call(input, _given(weight=weight, bias=bias))


def _linear_uses(call: Call, g: Tensor, layout: Layout) -> dict[str, Use]:
    return {"weight": Outer(g, as_rows(call.x), layout), "bias": Sums(layout.sum_rows(g))}


# torch.addmm(bias [out], x [R, in], weight [in, out]): transformers' Conv1D
def _bind_addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Call | None:  # noqa: A002
    return Call(mat1, {"bias": input, "weight": mat2}) if beta == alpha == 1 and input.shape == mat2.shape[1:] else None


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
        x, eps = call.x, call.options["eps"]
        if is_plain(x) and is_plain(g) and x.shape[-1] and native.built():
            small = torch.finfo(x.dtype).eps if eps is None else eps
            weight, bias = native.norm_sums(g, as_rows(x), layout, small, centred=normalise is F.layer_norm)
            return {"weight": Sums(weight), "bias": Sums(bias)}
        unit = as_rows(normalise(x, call.options["shape"], eps=eps))
        return {"weight": Sums(layout.sum_rows(g * unit)), "bias": Sums(layout.sum_rows(g))}

    return Rule(name, bind, run, uses)


# x * p and x + p, p broadcast over the samples: hand-written norms, LayerScale, stray biases, learned positions
def _bind_elementwise(x: Any, p: Any, *, alpha: float = 1) -> Call | None:
    if not (isinstance(x, Tensor) and isinstance(p, Tensor)) or alpha != 1:
        return None
    shape = torch.broadcast_shapes(x.shape, p.shape)
    return Call(x.expand(shape), {"p": p}, {"x": x}) if len(shape) > 1 else None


def _bind_in_place(x: Any, p: Any, *, alpha: float = 1) -> Call | None:
    call = _bind_elementwise(x, p, alpha=alpha)
    return call if call and call.x.shape == x.shape else None


def _broadcast_sums(g: Tensor, call: Call, layout: Layout) -> Sums:
    """`g` [samples, ...] added up over the dimensions along which p was repeated."""
    p = call.parameters["p"]
    size = [1] * (g.dim() - p.dim()) + list(p.shape)
    del size[call.batch_dim]
    repeated = [i + 1 for i, n in enumerate(size) if n == 1 and g.shape[i + 1] != 1]
    g = g.sum(repeated, keepdim=True) if repeated else g
    return Sums(layout.sum_rows(g).reshape(layout.num_samples, *p.shape))


def _scale_uses(call: Call, g: Tensor, layout: Layout) -> dict[str, Use]:
    return {"p": _broadcast_sums(g * call.x, call, layout)}


def _shift_uses(call: Call, g: Tensor, layout: Layout) -> dict[str, Use]:
    return {"p": _broadcast_sums(g, call, layout)}


# A matrix product written in letters: x [r..., c...] and p [c..., o...] or [o..., c...] give [r..., o...]
def _contraction(x: Tensor, p: Tensor, letters: str, run: Callable[[Tensor, Tensor], Tensor]) -> Call | None:
    ins, _, out = letters.partition("->")
    of_x, _, of_p = ins.partition(",")
    rows = [a for a in of_x if a in out and a not in of_p]
    inner = [a for a in of_p if a in of_x and a not in out]
    outer = [a for a in of_p if a in out and a not in of_x]
    plain = all(len(set(part)) == len(part) for part in (of_x, of_p, out))
    if not (plain and rows and inner and outer and len(of_x) == x.dim() and len(of_p) == p.dim()):
        return None
    if {*rows, *inner} != set(of_x) or {*rows, *outer} != set(out):
        return None
    if list(of_p) not in ([*inner, *outer], [*outer, *inner]):
        return None
    options = {
        "run": lambda: run(x, p),
        "inner_first": list(of_p) == [*inner, *outer],
        "gradient": [out.index(a) for a in (*rows, *outer)],
        "outer": len(outer),
    }
    return Call(x.permute([of_x.index(a) for a in (*rows, *inner)]).flatten(-len(inner)), {"p": p}, options)


def _bind_matmul(x: Tensor, p: Tensor) -> Call | None:
    if p.dim() != 2 or x.dim() < 2:
        return None
    rows = "abcdefgh"[: x.dim() - 1]
    return _contraction(x, p, f"{rows}y,yz->{rows}z", torch.matmul)


def _bind_matmul_from_left(p: Tensor, x: Tensor) -> Call | None:
    if p.dim() != 2 or x.dim() < 3:
        return None
    rows = "abcdefgh"[: x.dim() - 2]
    return _contraction(x, p, f"{rows}yt,zy->{rows}zt", lambda x, p: torch.matmul(p, x))


def _bind_einsum(equation: Any, *operands: Any) -> Call | None:
    if not isinstance(equation, str) or len(operands) != 2 or "..." in equation or "->" not in equation:
        return None
    letters = equation.replace(" ", "")
    return _contraction(*operands, letters, lambda x, p: torch.einsum(letters, x, p))


def _bind_einsum_from_left(equation: Any, *operands: Any) -> Call | None:
    if not isinstance(equation, str) or len(operands) != 2:
        return None
    ins, arrow, out = equation.partition("->")
    return _bind_einsum(",".join(ins.split(",")[::-1]) + arrow + out, *operands[::-1])


def _contraction_uses(call: Call, g: Tensor, layout: Layout) -> dict[str, Use]:
    x = as_rows(call.x)
    return {"p": Outer(x, g, layout) if call.options["inner_first"] else Outer(g, x, layout)}


# F.conv1d(x [B, C, T], weight [out, C / groups, k], bias [out]), plain or depthwise
def _bind_conv1d(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Call | None:
    depthwise = groups == input.shape[1] == weight.shape[0]
    if input.dim() != 3 or isinstance(padding, str) or not (groups == 1 or depthwise):
        return None
    steps = {k: v[0] if isinstance(v, (tuple, list)) else v for k, v in
             (("stride", stride), ("padding", padding), ("dilation", dilation))}  # fmt: skip
    return Call(input, _given(weight=weight, bias=bias), {**steps, "groups": groups})


def _conv1d_uses(call: Call, g: Tensor, layout: Layout) -> dict[str, Use]:
    o, k = call.options, call.parameters["weight"].shape[-1]
    reach = o["dilation"] * (k - 1) + 1
    patches = F.pad(call.x, (o["padding"], o["padding"])).unfold(-1, reach, o["stride"])[..., :: o["dilation"]]
    bias = Sums(layout.sum_rows(g.sum(-1)))
    if o["groups"] > 1:
        sums = layout.sum_rows(torch.einsum("bct,bctk->bck", g, patches))
        return {"weight": Sums(sums[:, :, None]), "bias": bias}
    rows = as_rows(patches.transpose(1, 2).flatten(2))
    return {"weight": Outer(as_rows(g.transpose(1, 2)), rows, layout.finer(g.shape[-1])), "bias": bias}


_ELEMENTWISE: dict[str, Any] = {
    "mirrored": lambda p, x, **options: _bind_elementwise(x, p, **options),
    "by_rows": False,
}
_LINEAR = Rule(
    "linear",
    _bind_linear,
    lambda c: linear(c.x, **c.parameters),
    _linear_uses,
    lambda parameters: parameters["weight"],
)
_ADDMM = Rule(
    "addmm",
    _bind_addmm,
    lambda c: times(c.x, c.parameters["weight"], c.parameters["bias"]),
    _addmm_uses,
    lambda parameters: parameters["weight"].T,
)
EMBEDDING = Rule(
    "embedding",
    _bind_embedding,
    lambda c: F.embedding(c.x, c.parameters["weight"], c.options["padding_idx"]),
    _embedding_uses,
)
_SCALE = Rule("scale", _bind_elementwise, lambda c: c.options["x"] * c.parameters["p"], _scale_uses, **_ELEMENTWISE)
_SHIFT = Rule("shift", _bind_elementwise, lambda c: c.options["x"] + c.parameters["p"], _shift_uses, **_ELEMENTWISE)
_SHIFT_IN_PLACE = Rule(
    "shift", _bind_in_place, lambda c: c.options["x"].add_(c.parameters["p"]), _shift_uses, by_rows=False
)


def _contraction_rule(bind: Callable[..., Call | None], mirrored: Callable[..., Call | None]) -> Rule:
    return Rule(
        "contraction",
        bind,
        lambda c: c.options["run"](),
        _contraction_uses,
        like_x=lambda c, g: g.permute(c.options["gradient"]).flatten(-c.options["outer"]),
        mirrored=mirrored,
    )


_MATMUL = _contraction_rule(_bind_matmul, _bind_matmul_from_left)
_CONV1D = Rule(
    "conv1d",
    _bind_conv1d,
    lambda c: F.conv1d(c.x, **c.parameters, **c.options),
    _conv1d_uses,
    by_rows=False,
)

RULES: dict[Any, Rule] = {
    F.linear: _LINEAR,
    torch.addmm: _ADDMM,
    F.embedding: EMBEDDING,
    F.layer_norm: _norm_rule("layer_norm", F.layer_norm, _bind_norm),
    F.rms_norm: _norm_rule("rms_norm", F.rms_norm, _bind_rms_norm),
    F.conv1d: _CONV1D,
    torch.einsum: _contraction_rule(_bind_einsum, _bind_einsum_from_left),
    **dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__, operator.matmul), _MATMUL),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, operator.mul), _SCALE),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, operator.add), _SHIFT),
    **dict.fromkeys((Tensor.add_, Tensor.__iadd__), _SHIFT_IN_PLACE),
}
