"""Leaving no trace: what a forward changes in a model, or needs changed, put back."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from guided_dropout.errors import ModelError, NotFiniteError
from guided_dropout.knobs import foreign_rate, is_foreign_dropout
from guided_dropout.likelihood import likelihood_alone

_ABSENT: Any = object()


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put the model in training mode, and put back whatever a training-mode forward may change in it."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(same_random_states(model))
        stack.enter_context(_same_parts(model))
        stack.enter_context(_same_buffers(model))
        stack.enter_context(same_weights(model))
        modes = {module: module.training for module in model.modules()}
        stack.callback(lambda: [setattr(module, "training", mode) for module, mode in modes.items()])
        model.train()
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False):
                stack.enter_context(replaced(module, "gradient_checkpointing", False))
            if is_foreign_dropout(module):
                stack.enter_context(replaced(module, "forward", partial(_foreign_forward, module)))
        yield


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no cache, the likelihood alone, no parameter requiring a gradient; all as it was after.

    A model that takes other submodules in a forward has its own again for the next.
    """
    modes = [(m, m.training) for m in model.modules()]
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    cache = getattr(getattr(model, "config", None), "use_cache", None)
    try:
        model.eval()
        for p, _ in wanted:
            p.requires_grad_(False)
        if cache is not None:
            model.config.use_cache = False  # pyright: ignore
        with contextlib.ExitStack() as stack:
            for context in (likelihood_alone, _same_buffers, _unscaled, _rnns_with_a_backward):
                stack.enter_context(context(model))
            parts = stack.enter_context(_same_parts(model))
            stack.callback(model.register_forward_hook(lambda *_: parts.take_back(), always_call=True).remove)
            yield
    finally:
        for m, training in modes:
            m.training = training
        for p, flag in wanted:
            p.requires_grad_(flag)
        if cache is not None:
            model.config.use_cache = cache  # pyright: ignore


@contextlib.contextmanager
def _rnns_with_a_backward(model: nn.Module) -> Iterator[None]:
    """In evaluation mode cuDNN's have none; torch's own have."""
    enabled = torch.backends.cudnn.enabled
    try:
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            torch.backends.cudnn.enabled = False
        yield
    finally:
        torch.backends.cudnn.enabled = enabled


@contextlib.contextmanager
def own_precision(model: nn.Module) -> Iterator[None]:
    """Within, no autocast of the caller's has a part in what the model computes."""
    with contextlib.ExitStack() as stack:
        for kind in {p.device.type for p in model.parameters()}:
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextlib.contextmanager
def requiring_grad(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Within, `parameters` require gradients; after, they do not."""
    parameters = list(parameters)
    for p in parameters:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(False)


def _foreign_forward(module: nn.Module, x: Tensor, *_: Any, **__: Any) -> Tensor:
    """Stands in for a dropout module that draws its own mask, so that the recorder sees its rate."""
    return F.dropout(x, getattr(module, foreign_rate(module)), module.training)


@contextlib.contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Give a module's (or another object's) own attribute another value for a while."""
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
def same_random_states(model: nn.Module) -> Iterator[None]:
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


class Parts:
    """The submodules, parameters and attributes that a model has now: BigBird takes others, for good, on short input.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module):
        self._saved = [(m, dict(vars(m)), dict(m._modules), dict(m._parameters)) for m in model.modules()]
        self._data = [(p, p.data) for p in model.parameters()]

    def are_there(self) -> bool:
        """Whether no submodule is another one."""
        return all(module._modules == parts for module, _, parts, _ in self._saved)

    def take_back(self) -> None:
        """Where a submodule is another one, put all back; what was added since stays."""
        if not self.are_there():
            for module, attributes, parts, _ in self._saved:
                vars(module).update(attributes)
                _refill(module._modules, parts)

    def put_back(self) -> None:
        """All as it was."""
        for module, attributes, parts, parameters in self._saved:
            _refill(vars(module), attributes)
            _refill(module._modules, parts)
            _refill(module._parameters, parameters)
        for p, data in self._data:  # a module's `.to` gives a parameter another tensor: Switch's router to float32
            if (p.dtype, p.device) != (data.dtype, data.device):
                p.data = data


def _refill(old: dict[str, Any], new: dict[str, Any]) -> None:
    old.clear()
    old.update(new)


@contextlib.contextmanager
def _same_parts(model: nn.Module) -> Iterator[Parts]:
    """Put submodules, parameters and attributes back."""
    parts = Parts(model)
    try:
        yield parts
    finally:
        parts.put_back()


@contextlib.contextmanager
def _unscaled(model: nn.Module) -> Iterator[None]:
    """Within, RWKV does not divide its weights for inference, unless it already has."""
    found: list[Any] = [getattr(m, "config", None) for m in model.modules()]
    configs = {id(config): config for config in found if getattr(config, "rescale_every", 0)}
    before = {} if has_divided_weights(model) else {i: config.rescale_every for i, config in configs.items()}
    try:
        for i in before:
            configs[i].rescale_every = 0
        yield
    finally:
        for i, every in before.items():
            configs[i].rescale_every = every


def has_divided_weights(model: nn.Module) -> bool:
    """Whether a model has divided its weights for inference, as RWKV does in its first forward of evaluation mode."""
    return any(getattr(m, "layers_are_rescaled", False) for m in model.modules()) and any(
        getattr(getattr(m, "config", None), "rescale_every", 0) for m in model.modules()
    )


@contextlib.contextmanager
def same_weights(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Put back the weights that are written to within; gives them as they were, by name."""
    writes = _Writes(model)
    try:
        with writes:
            yield writes.before
    finally:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name in writes.before:
                    p.copy_(writes.before[name])


@contextlib.contextmanager
def unwritten(model: nn.Module) -> Iterator[None]:
    """Make sure that no weight was written to within; without copies, so that none can be put back.

    Raises:
        ModelError: one was; in place of a `NotFiniteError`, which may come of it.
    """
    versions = [(name, p, p._version) for name, p in model.named_parameters()]
    found: NotFiniteError | None = None
    try:
        yield
    except NotFiniteError as e:
        found = e
    if names := [name for name, p, version in versions if p._version != version]:
        raise ModelError(
            f"{type(model).__name__} has written to {len(names)} of its parameters in a forward, {names[0]} among "
            "them; expected weights that stay as they are: load it anew and switch that off in its configuration"
        ) from found
    if found is not None:
        raise found


class _Writes(TorchDispatchMode):
    """Copies a parameter when it is about to be written to, directly or through a view: none where nothing is."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.before: dict[str, Tensor] = {}
        self._owners: dict[int, dict[str, Tensor]] = {}
        for name, p in model.named_parameters():
            if not p.is_meta:
                self._owners.setdefault(p.untyped_storage().data_ptr(), {})[name] = p

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = args[i] if i < len(args) else kwargs.get(argument.name)
                for t in written if isinstance(written, (list, tuple)) else [written]:
                    if isinstance(t, Tensor) and not t.is_meta:
                        for name, p in self._owners.get(t.untyped_storage().data_ptr(), {}).items():
                            self.before.setdefault(name, p.detach().clone())
        return func(*args, **kwargs)


@contextlib.contextmanager
def _same_buffers(model: nn.Module) -> Iterator[None]:
    """Put the buffers back: a batch norm in training mode updates its statistics, rotary embeddings their lengths."""
    saved = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]
    copies = {id(b): b.clone() for _, buffers in saved for b in buffers.values() if b is not None}
    try:
        yield
    finally:
        for module, buffers in saved:
            module._buffers.update(buffers)
            for buffer in buffers.values():
                # One that is expanded, or requires a gradient, cannot be written to, and so was not.
                if buffer is not None and (buffer.is_meta or not torch.equal(buffer, copies[id(buffer)])):
                    with torch.no_grad():
                        buffer.copy_(copies[id(buffer)])
