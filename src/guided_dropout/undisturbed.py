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
    """Evaluation mode, no cache, the likelihood alone, no parameter requiring a gradient; all as it was after."""
    modes = [(m, m.training) for m in model.modules()]
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    cache = getattr(getattr(model, "config", None), "use_cache", None)
    try:
        model.eval()
        for p, _ in wanted:
            p.requires_grad_(False)
        if cache is not None:
            model.config.use_cache = False  # pyright: ignore
        with likelihood_alone(model), _same_parts(model), _same_buffers(model), _rnns_with_a_backward(model):
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


@contextlib.contextmanager
def _same_parts(model: nn.Module) -> Iterator[None]:
    """Put submodules and attributes back: BigBird takes other attention modules, for good, on short input."""
    saved = [(module, dict(vars(module)), dict(module._modules)) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes, parts in saved:
            vars(module).clear()
            vars(module).update(attributes)
            module._modules.clear()
            module._modules.update(parts)


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
