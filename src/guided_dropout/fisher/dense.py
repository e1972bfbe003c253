r"""Per-sample gradients formed whole, one sample after the other, for what the compact forms do not cover.

Three things come here: an operation without a rule, which is differentiated alone for each sample (`OneByOne`);
parameters of which different parts or forms are used, so that their gradients must be added up before squaring; and
what the model makes of parameters alone (`operations.Origin`), whose gradients are taken back to the parameters by
autograd. None of it runs the model again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from guided_dropout.fisher.operations import Origin, View, replaced
from guided_dropout.fisher.squares import Outer, Rows, Sums, Use
from guided_dropout.fisher.totals import Totals


@dataclass(frozen=True)
class OneByOne:
    """One operation, differentiated for one sample at a time with respect to one of its tensors.

    Attributes:
        function: the operation, with `args` and `kwargs`.
        target: the tensor to differentiate by.
        batch_dims: id of each tensor along which the samples lie → the dimension.
        gradient: of the output, with `gradient_dim` its dimension of samples.
        num_samples: B.
    """

    function: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    target: Tensor
    batch_dims: Mapping[int, int]
    gradient: Tensor
    gradient_dim: int
    num_samples: int

    def of_sample(self, sample: int) -> Tensor:
        """The gradient of one sample, of the target's shape."""
        with torch.enable_grad():
            leaf = self.target.detach().requires_grad_()

            def own(t: Tensor) -> Tensor:
                value = leaf if t is self.target else t.detach()
                dim = self.batch_dims.get(id(t))
                return value if dim is None else part_of(value, dim, sample, self.num_samples)

            args, kwargs = replaced((self.args, self.kwargs), own)
            out = self.function(*args, **kwargs)
            if not out.requires_grad:  # it was asked for its type alone
                return torch.zeros_like(leaf)
            gradient = part_of(self.gradient, self.gradient_dim, sample, self.num_samples)
            return torch.autograd.grad(out, leaf, gradient, materialize_grads=True)[0]


def part_of(t: Tensor, dim: int, sample: int, num_samples: int) -> Tensor:
    """What of `t` belongs to a sample, where the samples lie one after the other along `dim`."""
    step = t.shape[dim] // num_samples
    return t.narrow(dim, sample * step, step)


# (the part of the parameter that was used, what the operation contributed)
Part = tuple[View, Use | OneByOne]


def add_dense_squares(
    totals: Totals,
    sums: Mapping[str, Tensor],
    parts: Mapping[str, Sequence[Part]],
    derived: Sequence[tuple[Origin, Use | OneByOne]],
    leaves: Mapping[str, Tensor],
    num_samples: int,
) -> None:
    r"""Form each sample's gradients of some parameters, square them, add them up.

    Args:
        totals: the running sums.
        sums: name → [B] float64; gets each :math:`\lVert g_b\rVert^2` added in place, where it is there.
        parts: name → what is used of it where; the names are those of the parameters to be squared.
        derived: uses of what the model made of parameters.
        leaves: name → what the graphs of `derived` begin with.
        num_samples: B.
    """
    names = list(parts)
    origins = list({id(o): o for o, _ in derived}.values())
    for b in range(num_samples):
        grads = {n: torch.zeros_like(leaves[n], dtype=_wide(leaves[n])) for n in names}
        for n in names:
            for view, use in parts[n]:
                _add_to(view.within(grads[n]), use, b)
        behind = {id(o): torch.zeros_like(o.graph, dtype=_wide(o.graph)) for o in origins}
        for o, use in derived:
            _add_to(behind[id(o)], use, b)
        if origins:
            given = [behind[id(o)].to(o.graph.dtype) for o in origins]
            back = torch.autograd.grad(
                [o.graph for o in origins], [leaves[n] for n in names], given, retain_graph=True, allow_unused=True
            )
            for n, g in zip(names, back, strict=True):
                if g is not None:
                    grads[n] += g
        for n, g in grads.items():
            if not totals.scores_only:
                totals[n].addcmul_(g, g)
            if n in sums:
                sums[n][b] += torch.linalg.vector_norm(g).double().square()


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _add_to(gradient: Tensor, use: Use | OneByOne, sample: int) -> None:
    """Add a sample's gradient to `gradient`, of the shape of the tensor used."""
    if isinstance(use, OneByOne):
        gradient.add_(use.of_sample(sample))
    elif isinstance(use, Sums):
        gradient.add_(use.grads[sample].view(gradient.shape))
    else:
        span = slice(use.layout.offsets[sample], use.layout.offsets[sample + 1])
        if isinstance(use, Rows):
            rows = use.layout.row_numbers(use.ids.device)[span]
            gradient.index_add_(0, use.ids[rows], use.grads[rows].to(gradient.dtype))
        else:
            left = use.layout.take(use.left, span).to(gradient.dtype)
            right = use.layout.take(use.right, span).to(gradient.dtype)
            gradient.add_((left.T @ right).view(gradient.shape))


def swapped(use: Outer) -> Outer:
    """The same products, transposed."""
    return Outer(use.right, use.left, use.layout)
