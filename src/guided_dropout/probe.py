"""One forward of a model in training mode, observed: which rate reaches each dropout call, after which parameters.

Nothing is dropped meanwhile, no random number is drawn for dropout, and the model is afterwards as it was.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from guided_dropout.attention import plain_attention, plain_experts
from guided_dropout.errors import SiteError
from guided_dropout.knobs import Knob, find_knobs
from guided_dropout.tiny_batch import tiny_batch
from guided_dropout.undisturbed import undisturbed

DROPOUTS: set[Any] = {
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
    *(torch.dropout, torch.dropout_, torch.alpha_dropout, torch.alpha_dropout_),
    *(torch.feature_dropout, torch.feature_dropout_, torch.feature_alpha_dropout, torch.feature_alpha_dropout_),
}
_ATTENTION: Any = F.scaled_dot_product_attention
_ATTENTION_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_RECURRENT: set[Any] = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}  # drop between their layers
_replacements_aside = False
QUIET = 1e-9  # a rate so small that layer drop, whose rate is a knob too, all but never fires during a probe


@dataclass(frozen=True)
class DropoutCall:
    """A dropout call with a rate above 0.

    Attributes:
        rate: the rate that it received.
        on_attention: whether it acts on attention probabilities.
        parameters: names of the parameters used since the call before.
    """

    rate: float
    on_attention: bool
    parameters: frozenset[str]


def observe(
    model: nn.Module,
    inputs: Mapping[str, Any] | None = None,
    *contexts: contextlib.AbstractContextManager[Any],
    rates: Mapping[str, float],
    known: Collection[float] | None = None,
    behind: bool = True,
) -> list[DropoutCall]:
    """Run the model once in training mode and list its dropout calls with a rate above 0, in order.

    Args:
        model: the model; it is left as it was (rates, modes, buffers, random states).
        inputs: keyword arguments of its forward; a tiny batch made from its configuration by default.
        contexts: to run it in.
        rates: rates that the knobs at these paths have during the run.
        known: the only rates that may be met; None for any.
        behind: see the calls whose dropout something else replaces as well.

    Raises:
        SiteError: a rate outside of `known`, or a model that does not run on the tiny batch.
    """
    recorder = _Recorder(model, known)
    knobs = find_knobs(model)
    turns = (turned(knobs[path], rate) for path, rate in rates.items())
    run_once(model, inputs, *turns, *contexts, recorder, behind=behind)
    return recorder.calls


def run_once(
    model: nn.Module,
    inputs: Mapping[str, Any] | None,
    *contexts: contextlib.AbstractContextManager[Any],
    behind: bool = True,
) -> None:
    """Run the model once in training mode, without gradients, inside of `contexts`; leave it as it was.

    What replaces dropout steps aside, `replacements_aside`, unless `behind` is False.

    Raises:
        SiteError: there are no `inputs`, and the model does not run on the tiny batch; or it takes other modules in its
            forward, which no rate set before would reach.
    """
    batch = tiny_batch(model) if inputs is None else inputs
    with undisturbed(model), torch.no_grad(), contextlib.ExitStack() as stack:
        # Compiled, a model would be compiled anew for each probe: its graph breaks at what watches it.
        uncompiled = torch.compiler.set_stance("force_eager")
        for context in (uncompiled, _aside(behind), plain_attention(model), plain_experts(model), *contexts):
            stack.enter_context(context)
        parts = dict(model.named_modules())
        try:
            model(**batch)
        except SiteError:
            raise
        except Exception as e:
            if inputs is not None:
                raise
            reason = next(iter(str(e).splitlines()), "no message")
            raise SiteError(
                f"{type(model).__name__} does not run on a batch of {', '.join(batch)} made from its configuration "
                f"({type(e).__name__}: {reason}); expected a transformers model: pass inputs= that it runs on"
            ) from e
        _check_parts(model, parts)


def _check_parts(model: nn.Module, before: Mapping[str, nn.Module]) -> None:
    after = dict(model.named_modules())
    for path in sorted({**before, **after}, key=len):
        if before.get(path) is not after.get(path):
            raise SiteError(
                f"{type(model).__name__} takes another module for {path} in its forward, with rates of its own; "
                "expected the same modules before and after: fix what it chooses by in the configuration (of BigBird, "
                "attention_type='original_full'), or pass inputs= as long as those that it will be trained on"
            )


def replacements_aside() -> bool:
    """Whether dropout should be itself now, although something has been put in its place."""
    return _replacements_aside


@contextlib.contextmanager
def _aside(aside: bool) -> Iterator[None]:
    global _replacements_aside
    before, _replacements_aside = _replacements_aside, aside
    try:
        yield
    finally:
        _replacements_aside = before


@contextlib.contextmanager
def turned(knob: Knob, rate: float) -> Iterator[None]:
    """Give a knob another rate for a while."""
    old = knob.rate
    knob.turn(rate)
    try:
        yield
    finally:
        knob.turn(old)


class ParameterUses(TorchFunctionMode):
    """Notes which parameters operations take.

    Attributes:
        used: their names, in the order of their first use.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.used: dict[str, None] = {}
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        # To ask a parameter for its dtype or shape is not to use it: only what yields a tensor counts.
        if next(tensors_in([result]), None) is not None:
            self._use([args, kwargs])
        return result

    def _use(self, values: list[Any]) -> None:
        self.used |= {self._names[id(t)]: None for t in tensors_in(values) if id(t) in self._names}


class _Recorder(ParameterUses):
    """Notes the dropout calls that have a rate, and lets none of them drop anything."""

    def __init__(self, model: nn.Module, known: Collection[float] | None):
        super().__init__(model)
        self.calls: list[DropoutCall] = []
        self._modules = {id(module): name for name, module in model.named_modules()}
        self._known = known

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in DROPOUTS:
            return self._dropout(*dropped(*args, **kwargs))
        if func is _ATTENTION:
            return self._attention(**dict(zip(_ATTENTION_ARGUMENTS, args, strict=False)), **kwargs)
        if func is F.multi_head_attention_forward:
            return self._multi_head_attention(inspect.signature(func).bind(*args, **kwargs))
        if func in _RECURRENT:
            args = self._recurrent(*args)
        return super().__torch_function__(func, types, args, kwargs)

    def _dropout(self, x: Tensor, rate: float) -> Tensor:
        self._call(rate, on_attention=_are_probabilities(x))
        return x

    def _attention(self, *, dropout_p: float = 0.0, **arguments: Any) -> Tensor:
        self._call(dropout_p, on_attention=True)
        return _ATTENTION(**arguments)

    def _multi_head_attention(self, bound: inspect.BoundArguments) -> Any:
        bound.apply_defaults()
        self._use([bound.args, bound.kwargs])
        self._call(bound.arguments["dropout_p"] if bound.arguments["training"] else 0.0, on_attention=True)
        bound.arguments["dropout_p"] = 0.0
        return F.multi_head_attention_forward(*bound.args, **bound.kwargs)

    def _recurrent(self, *args: Any) -> tuple[Any, ...]:
        """The arguments without a rate. After the weights: biases or not, layers, rate, training; packed: one later."""
        layers = 4 if isinstance(args[3], bool) else 5
        rate, training = args[layers + 1 : layers + 3]
        self._use([args])
        self._call(rate if training and args[layers] > 1 else 0.0, on_attention=False)
        return (*args[: layers + 1], 0.0, *args[layers + 2 :])

    def _call(self, rate: float, *, on_attention: bool) -> None:
        if rate == 0:
            return
        if self._known is not None and rate not in self._known:
            raise SiteError(
                f"{self._caller()} drops at rate {rate:g}, which is no dropout module's and no float attribute's named "
                "*drop*; expected each rate to have a place where it can be set: set this one to 0 in the configuration"
            )
        self.calls.append(DropoutCall(rate, on_attention, frozenset(self.used)))
        self.used.clear()

    def _caller(self) -> str:
        """Class and path of the innermost module on the call stack."""
        frame = sys._getframe()
        while frame := frame.f_back:
            module = frame.f_locals.get("self")
            if id(module) in self._modules:
                return f"{type(module).__name__} ({self._modules[id(module)] or 'the model itself'})"
        return "the model"


def dropped(
    input: Tensor,  # noqa: A002 (all of these are PyTorch's names; torch.dropout says `train` for `training`)
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    train: bool = True,
) -> tuple[Tensor, float]:
    """What a call of one of `DROPOUTS` drops on, and the rate at which it does: 0 outside of training mode."""
    return input, p if training and train else 0.0


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and mappings."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)
        elif isinstance(value, Mapping):
            yield from tensors_in(value.values())


def _are_probabilities(x: Tensor) -> bool:
    """Whether each row of `x` [..., T] is a distribution, as far as half precision can say: so it is attention.

    Rows of zeros are those of padding, as Longformer's attention has them.
    """
    if x.dim() < 3 or x.shape[-1] < 2:
        return False
    sums = x.float().sum(-1)
    one = (sums - 1).abs() < 0.02
    return bool((x >= 0).all()) and bool(one.any()) and bool((one | (sums == 0)).all())
