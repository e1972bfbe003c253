"""One forward of a model in training mode, observed: which rate reaches each dropout call, after which parameters.

Nothing is dropped meanwhile, no random number is drawn for dropout, and the model is afterwards as it was.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import random
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from guided_dropout.errors import SiteError

_DROPOUTS: set[Any] = {
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
    *(torch.dropout, torch.dropout_, torch.alpha_dropout, torch.alpha_dropout_),
    *(torch.feature_dropout, torch.feature_dropout_, torch.feature_alpha_dropout, torch.feature_alpha_dropout_),
}
_ATTENTION: Any = F.scaled_dot_product_attention
_ATTENTION_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_TOKENS = 6  # of the tiny batch: enough for any position table, too few for a window or a bucket to matter
_ABSENT: Any = object()


@dataclass(frozen=True, eq=False)
class Knob:
    """A number on a module that looks like a dropout rate.

    Attributes:
        path: path of the dropout module; for a float, of the module that holds it, a dot and the attribute's name.
        module: the module that holds the number.
        attribute: the number's name on it.
        kind: ``"module"`` or ``"attribute"``.
    """

    path: str
    module: nn.Module
    attribute: str
    kind: str

    @property
    def rate(self) -> float:
        """The number that stands on the module now."""
        return getattr(self.module, self.attribute)

    def turn(self, rate: float) -> None:
        """Let `rate` stand on the module from now on."""
        setattr(self.module, self.attribute, rate)


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


def find_knobs(model: nn.Module) -> dict[str, Knob]:
    """Every dropout module and every float attribute whose name holds "drop", by path, whether or not it is heard."""
    knobs = [knob for name, module in model.named_modules() for knob in _knobs_of(name, module)]
    return {knob.path: knob for knob in knobs}


def _knobs_of(name: str, module: nn.Module) -> Iterator[Knob]:
    if isinstance(module, _DropoutNd):
        yield Knob(name, module, "p", "module")
    elif _is_foreign_dropout(module):
        yield Knob(name, module, _foreign_rate(module), "module")
    else:
        for key, value in vars(module).items():
            if "drop" in key.lower() and _is_rate(value):
                yield Knob(f"{name}.{key}" if name else key, module, key, "attribute")


def _is_foreign_dropout(module: nn.Module) -> bool:
    """Whether this is a dropout module that does not derive from PyTorch's, like DeBERTa's ``StableDropout``."""
    named_so = type(module).__name__.lower().endswith("dropout") and not isinstance(module, _DropoutNd)
    return named_so and any(_is_rate(vars(module).get(key)) for key in ("p", "drop_prob"))


def _foreign_rate(module: nn.Module) -> str:
    return "drop_prob" if _is_rate(vars(module).get("drop_prob")) else "p"


def _is_rate(value: Any) -> bool:
    """Whether `value` may be a rate. Whole numbers other than 0 are more likely counts."""
    return (isinstance(value, float) and 0.0 <= value <= 1.0) or (type(value) is int and value == 0)


def observe(
    model: nn.Module,
    inputs: Mapping[str, Any] | None = None,
    *,
    rates: Mapping[str, float],
    known: Collection[float] | None = None,
) -> list[DropoutCall]:
    """Run the model once in training mode and list its dropout calls with a rate above 0, in order.

    Args:
        model: the model; it is left as it was (rates, modes, buffers, random states).
        inputs: keyword arguments of its forward; a tiny batch made from its configuration by default.
        rates: rates that the knobs at these paths have during the run.
        known: the only rates that may be met; None for any.

    Raises:
        SiteError: a rate outside of `known`, or a model that does not run on the tiny batch.
    """
    recorder = _Recorder(model, known)
    with _undisturbed(model), contextlib.ExitStack() as stack:
        knobs = find_knobs(model)
        for path, rate in rates.items():
            stack.enter_context(_replaced(knobs[path].module, knobs[path].attribute, rate))
        _run(model, inputs, recorder)
    return recorder.calls


def _run(model: nn.Module, inputs: Mapping[str, Any] | None, recorder: _Recorder) -> None:
    if inputs is not None:
        with torch.no_grad(), recorder:
            model(**inputs)
        return
    batch = tiny_batch(model)
    try:
        with torch.no_grad(), recorder:
            model(**batch)
    except SiteError:
        raise
    except Exception as e:
        reason = next(iter(str(e).splitlines()), "no message")
        raise SiteError(
            f"{type(model).__name__} does not run on a batch of {', '.join(batch)} made from its configuration "
            f"({type(e).__name__}: {reason}); expected a language model: pass inputs= that it runs on"
        ) from e


def tiny_batch(model: nn.Module) -> dict[str, Tensor]:
    """One sequence of ordinary tokens and an end-of-sequence token, for whatever of these the model's forward takes.

    Returns:
        ``input_ids``, and ``attention_mask`` and ``decoder_input_ids`` where there are such; each [1, 6] int64.

    Raises:
        SiteError: the model has no configuration, or takes no token ids.
    """
    config, accepted = getattr(model, "config", None), inspect.signature(model.forward).parameters
    if config is None or "input_ids" not in accepted:
        raise SiteError(
            f"no batch can be made for {type(model).__name__}; expected a transformers model that takes input_ids: "
            "pass inputs= that it runs on"
        )
    embeddings: Any = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    ids = torch.tensor([_ordinary_tokens(config, len(embeddings.weight))], device=embeddings.weight.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids}
    if not getattr(config, "is_encoder_decoder", False):
        del batch["decoder_input_ids"]
    return {name: tensor for name, tensor in batch.items() if name in accepted}


def _ordinary_tokens(config: Any, vocabulary: int) -> list[int]:
    """Token ids without padding (heads look for the last real token), ending as BART's classifier wants it."""
    marks = {key: value for key, value in vars(config).items() if key.endswith("token_id")}
    special = {i for value in marks.values() for i in (value if isinstance(value, list) else [value])}
    ordinary = list(itertools.islice((i for i in range(vocabulary) if i not in special), _TOKENS)) or [0]
    ids = list(itertools.islice(itertools.cycle(ordinary), _TOKENS))
    eos = marks.get("eos_token_id")
    eos = eos[0] if isinstance(eos, list) else eos
    return ids if eos is None or not 0 <= eos < vocabulary else [*ids[:-1], eos]


class _Recorder(TorchFunctionMode):
    """Notes the dropout calls that have a rate, and lets none of them drop anything."""

    def __init__(self, model: nn.Module, known: Collection[float] | None):
        super().__init__()
        self.calls: list[DropoutCall] = []
        self._modules = {id(module): name for name, module in model.named_modules()}
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._known = known
        self._used: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            return self._dropout(*args, **kwargs)
        if func is _ATTENTION:
            return self._attention(**dict(zip(_ATTENTION_ARGUMENTS, args, strict=False)), **kwargs)
        if func is F.multi_head_attention_forward:
            return self._multi_head_attention(inspect.signature(func).bind(*args, **kwargs))
        result = func(*args, **kwargs)
        # To ask a parameter for its dtype or shape is not to use it: only what yields a tensor counts.
        if next(_tensors([result]), None) is not None:
            self._use([args, kwargs])
        return result

    def _dropout(
        self,
        input: Tensor,  # noqa: A002 (all of these are PyTorch's names; torch.dropout says `train` for `training`)
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
        *,
        train: bool = True,
    ) -> Tensor:
        self._call(p if training and train else 0.0, on_attention=_are_probabilities(input))
        return input

    def _attention(self, *, dropout_p: float = 0.0, **arguments: Any) -> Tensor:
        self._call(dropout_p, on_attention=True)
        return _ATTENTION(**arguments)

    def _multi_head_attention(self, bound: inspect.BoundArguments) -> Any:
        bound.apply_defaults()
        self._use([bound.args, bound.kwargs])
        self._call(bound.arguments["dropout_p"] if bound.arguments["training"] else 0.0, on_attention=True)
        bound.arguments["dropout_p"] = 0.0
        return F.multi_head_attention_forward(*bound.args, **bound.kwargs)

    def _call(self, rate: float, *, on_attention: bool) -> None:
        if rate == 0:
            return
        if self._known is not None and rate not in self._known:
            raise SiteError(
                f"{self._caller()} drops at rate {rate:g}, which is no dropout module's and no float attribute's named "
                "*drop*; expected each rate to have a place where it can be set: set this one to 0 in the configuration"
            )
        self.calls.append(DropoutCall(rate, on_attention, frozenset(self._used)))
        self._used.clear()

    def _use(self, values: list[Any]) -> None:
        self._used.update(self._names[id(t)] for t in _tensors(values) if id(t) in self._names)

    def _caller(self) -> str:
        """Class and path of the innermost module on the call stack."""
        frame = sys._getframe()
        while frame := frame.f_back:
            module = frame.f_locals.get("self")
            if id(module) in self._modules:
                return f"{type(module).__name__} ({self._modules[id(module)] or 'the model itself'})"
        return "the model"


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and mappings."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
        elif isinstance(value, Mapping):
            yield from _tensors(value.values())


def _are_probabilities(x: Tensor) -> bool:
    """Whether each row of `x` [..., T] is a distribution, as far as half precision can say: so it is attention."""
    if x.dim() < 3 or x.shape[-1] < 2:
        return False
    return bool((x >= 0).all()) and bool(((x.float().sum(-1) - 1).abs() < 0.02).all())


# --- leaving no trace ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Put the model in training mode, and put back whatever a training-mode forward may change in it."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_same_random_states(model))
        stack.enter_context(_same_buffers(model))
        modes = {module: module.training for module in model.modules()}
        stack.callback(lambda: [setattr(module, "training", mode) for module, mode in modes.items()])
        model.train()
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False):
                stack.enter_context(_replaced(module, "gradient_checkpointing", False))
            if _is_foreign_dropout(module):
                stack.enter_context(_replaced(module, "forward", partial(_foreign_forward, module)))
        yield


def _foreign_forward(module: nn.Module, x: Tensor) -> Tensor:
    """Stands in for a dropout module that draws its own mask, so that the recorder sees its rate."""
    return F.dropout(x, getattr(module, _foreign_rate(module)), module.training)


@contextlib.contextmanager
def _replaced(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Give a module's own attribute another value for a while."""
    old = vars(module).get(name, _ABSENT)
    setattr(module, name, value)
    try:
        yield
    finally:
        if old is _ABSENT:
            delattr(module, name)
        else:
            setattr(module, name, old)


@contextlib.contextmanager
def _same_random_states(model: nn.Module) -> Iterator[None]:
    """Put the random states of Python, NumPy and PyTorch (CPU and the model's devices) back afterwards."""
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    kind = next((device.type for device in devices), "cuda")
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device.index for device in devices], device_type=kind):
            torch.default_generator.manual_seed(0)  # layer drop draws from it; 0 is a seed under which none fires
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextlib.contextmanager
def _same_buffers(model: nn.Module) -> Iterator[None]:
    """Put the buffers back afterwards: a batch norm in training mode updates its running statistics."""
    saved = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]
    copies = {id(b): b.clone() for _, buffers in saved for b in buffers.values() if b is not None}
    try:
        yield
    finally:
        for module, buffers in saved:
            module._buffers.update(buffers)
            for buffer in buffers.values():
                if buffer is not None:
                    buffer.copy_(copies[id(buffer)])
