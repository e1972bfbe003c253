"""Gaussian dropout: the same sites and rates, multiplied by Gaussian noise instead of a mask."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from guided_dropout.errors import SiteError
from guided_dropout.knobs import Knob, find_knobs
from guided_dropout.probe import observe
from guided_dropout.regularizers.base import Context, Handle, Regularizer
from guided_dropout.regularizers.forwards import wrap_forward
from guided_dropout.sites import trace

_DROPOUTS: set[Any] = {F.dropout, torch.dropout, torch.dropout_}
_ATTENTION: Any = F.scaled_dot_product_attention
_QUIET = 1e-9  # so small that layer drop, whose rate is a knob too, all but never fires during the proof


@dataclass(frozen=True)
class GaussianDropout(Regularizer):
    r"""Multiplies by Gaussian noise wherever the backbone would drop, at the rates that its sites have.

    .. math:: y = x\odot\varepsilon,\qquad \varepsilon_i\sim\mathcal N\Bigl(1,\;\sigma^2=\frac{p}{1-p}\Bigr)

    (Srivastava et al., 2014, section 10; Wang & Manning, 2013): mean and variance are those of dropout at rate p. In
    evaluation mode it is the identity. Attention probabilities get noise too. Where a fused kernel would keep them to
    itself (``attn_implementation="sdpa"``), attention is computed step by step in training mode, with the same result
    but for the noise; evaluation keeps the kernel. The head's own dropout stays as it is.
    """

    def apply(self, model: nn.Module, context: Context) -> Handle:
        """Replace the noise, and prove by running the model that no site drops any more; see `Regularizer.apply`.

        Rates may change later (`rates.apply_dropout`): the noise follows them.
        """
        before = trace(model, context.inputs)
        knobs = find_knobs(model)
        sites = [site for site in before.sites if not site.in_head]
        handle = Handle({"sites": len(sites)})
        try:
            for module in _around(model, [knobs[site.path] for site in sites]):
                wrap_forward(handle, module, _Noise)
            self._prove(model, context, before)
        except BaseException:
            handle.remove()
            raise
        return handle

    def _prove(self, model: nn.Module, context: Context, before: Any) -> None:
        heads = {site.path for site in before.sites if site.in_head}
        # Loud enough on every site that a call which still drops cannot hide behind a rate of 0.
        loud = {site.path: 0.5 for site in before.sites} | dict.fromkeys(before.dead, _QUIET)
        dropping = len(observe(model, context.inputs, rates=loud))
        expected = sum(path in heads for path in before.calls)
        if dropping != expected:
            raise SiteError(
                f"{dropping - expected} dropout calls of {type(model).__name__} cannot be given Gaussian noise; "
                "expected each to be torch's dropout or scaled_dot_product_attention: choose another "
                "attn_implementation"
            )


def gaussian_noise(x: Tensor, rate: float) -> Tensor:
    """`x` times Gaussian noise with the mean and variance of inverted dropout at `rate` in [0, 1); any shape."""
    if rate == 0:
        return x
    return x * (1 + math.sqrt(rate / (1 - rate)) * torch.randn_like(x))


def _around(model: nn.Module, knobs: list[Knob]) -> list[nn.Module]:
    """The modules in whose forward the knobs' rates are used: the dropout modules, and those that hold them."""
    found: dict[int, nn.Module] = {}
    for knob in knobs:
        holders = [knob.module]
        if knob.kind == "module":  # attention may read its rate without calling it
            holders.append(model.get_submodule(knob.path.rpartition(".")[0]))
        found |= {id(module): module for module in holders}
    return list(found.values())


class _Noise(TorchFunctionMode):
    """Turns dropout calls into Gaussian noise."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            return _dropout(*args, **kwargs)
        if func is _ATTENTION:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)


def _dropout(
    input: Tensor,  # noqa: A002 (all of these are PyTorch's names; torch.dropout says `train` for `training`)
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    train: bool = True,
) -> Tensor:
    return gaussian_noise(input, p) if training and train else input


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention` as its documentation spells it out, with noise on the probabilities."""
    if dropout_p == 0:
        return _ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        past = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~past, -math.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    blind = (scores == -math.inf).all(-1, keepdim=True)  # padding that may look at nothing: 0, as the kernels say
    probabilities = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    return gaussian_noise(probabilities, dropout_p) @ value
