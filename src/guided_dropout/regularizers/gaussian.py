"""Gaussian dropout: the same sites and rates, multiplied by Gaussian noise instead of a mask."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from guided_dropout.attention import attention_implementations, keeps_its_rate
from guided_dropout.errors import SiteError
from guided_dropout.knobs import Knob, find_knobs, is_foreign_dropout
from guided_dropout.probe import QUIET, dropped, observe, replacements_aside
from guided_dropout.regularizers.base import Context, Handle, Regularizer
from guided_dropout.regularizers.forwards import wrap_forward
from guided_dropout.residual import ATTRIBUTE as RESIDUAL
from guided_dropout.sites import DropoutSite, DropoutTrace, trace

_DROPOUTS: set[Any] = {F.dropout, torch.dropout, torch.dropout_}
_ATTENTION: Any = F.scaled_dot_product_attention
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class GaussianDropout(Regularizer):
    r"""Multiplies by Gaussian noise wherever the backbone would drop, at the rates that its sites have.

    .. math:: y = x\odot\varepsilon,\qquad \varepsilon_i\sim\mathcal N\Bigl(1,\;\sigma^2=\frac{p}{1-p}\Bigr)

    (Srivastava et al., 2014, section 10; Wang & Manning, 2013): mean and variance are those of dropout at rate p. In
    evaluation mode it is the identity. Attention probabilities get noise too. Where a fused kernel would keep them to
    itself (``attn_implementation="sdpa"``), attention is computed step by step in training mode, with the same result
    but for the noise; evaluation keeps the kernel. Added residual sites and adapters' dropout are sites like others.
    The head's own dropout stays as it is.
    """

    holds_weights: ClassVar[bool] = False

    def apply(self, model: nn.Module, context: Context) -> Handle:
        """Replace the noise, and prove by running the model that no site drops any more; see `Regularizer.apply`.

        Rates may change later (`rates.apply_dropout`): the noise follows them. Sites that are added later do not get
        noise, nor does flash or flex attention that gets a rate above 0 later; one that has it now is refused.
        """
        before = trace(model, context.inputs)
        knobs = find_knobs(model)
        sites = [site for site in before.sites if not site.in_head]
        for site in sites:
            if is_foreign_dropout(knobs[site.path].module):
                kind = type(knobs[site.path].module).__name__
                raise _refused(f"{site.path} ({kind}) draws its own mask", "use plain dropout on this model")
            if site.rate >= 1:
                raise _refused(f"{site.path} has rate {site.rate:g}, which drops all", "give it a rate below 1")
        _check_attention(model, sites)
        handle = Handle({"sites": len(sites)})
        try:
            for module in _around(model, [knobs[site.path] for site in sites]):
                wrap_forward(handle, module, _Noise)
            self._prove(model, context, before)
        except BaseException:
            handle.remove()
            raise
        return handle

    def _prove(self, model: nn.Module, context: Context, before: DropoutTrace) -> None:
        heads = {site.path for site in before.sites if site.in_head}
        # Loud enough on every site that a call which still drops cannot hide behind a rate of 0.
        by_rate = {0.5 + k * 2.0**-20: site.path for k, site in enumerate(before.sites)}
        loud = {path: rate for rate, path in by_rate.items()} | dict.fromkeys(before.dead, QUIET)
        calls = [(by_rate[call.rate], call) for call in observe(model, context.inputs, rates=loud, behind=False)]
        for path, call in calls:
            if path not in heads:
                raise _refused(
                    f"{path} still drops",
                    "choose another attn_implementation" if call.on_attention else "use plain dropout on this model",
                )
        dropping = [path for path, _ in calls]
        for path in before.calls:
            if path in heads and dropping.count(path) != before.calls.count(path):
                raise _refused(f"{path} lies in the head and no longer drops", "use plain dropout on this model")


def _check_attention(model: nn.Module, sites: Iterable[DropoutSite]) -> None:
    kernels = sorted(filter(keeps_its_rate, attention_implementations(model)))
    dropping = [site for site in sites if site.kind == "attention" and site.rate > 0]
    if kernels and dropping:
        raise _refused(
            f"{dropping[0].path} has rate {dropping[0].rate:g} in the kernel of {kernels[0]}",
            'call model.set_attn_implementation("sdpa") or "eager", or give attention sites rate 0',
        )


def _refused(found: str, todo: str) -> SiteError:
    return SiteError(
        f"{found}, so that it cannot have Gaussian noise of its own; expected torch's dropout or "
        f"scaled_dot_product_attention, called in the forward of the module that holds the rate: {todo}"
    )


def gaussian_noise(x: Tensor, rate: float) -> Tensor:
    """`x` times Gaussian noise with the mean and variance of inverted dropout at `rate` in [0, 1); any shape."""
    if rate == 0:
        return x
    return x * (1 + math.sqrt(rate / (1 - rate)) * torch.randn_like(x))


def _around(model: nn.Module, knobs: list[Knob]) -> list[nn.Module]:
    """The modules in whose forward the knobs' rates are used: those that hold them, or a module around these."""
    paths = {module: path for path, module in model.named_modules()}
    found: dict[nn.Module, None] = {}
    for knob in knobs:
        if not isinstance(knob.module, _CONTAINERS):
            found[knob.module] = None
        # Attention may read the rate of a dropout module without calling it; where there is an identity, a dropout
        # module may come later; and a residual site's hook runs after the forward of its own module.
        if knob.kind == "module" or knob.attribute == RESIDUAL:
            found[_parent(model, paths[knob.module])] = None
    return list(found)


def _parent(model: nn.Module, path: str) -> nn.Module:
    """The nearest module around `path` that has a forward."""
    parents = (model.get_submodule(".".join(path.split(".")[:k])) for k in range(path.count("."), -1, -1))
    return next(module for module in parents if not isinstance(module, _CONTAINERS))


class _Noise(TorchFunctionMode):
    """Turns dropout calls into Gaussian noise, whatever module it is around."""

    def __init__(self, _: nn.Module) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if replacements_aside():
            return func(*args, **kwargs)
        if func in _DROPOUTS:
            return gaussian_noise(*dropped(*args, **kwargs))
        if func is _ATTENTION:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)


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
