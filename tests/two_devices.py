"""Two devices where there is one: CPU tensors that pretend to lie on ``cuda:k``, under torch's rules for devices.

A tag on each storage says where it is. Operations on tensors of different devices raise what torch raises.
"""

import contextlib

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU = torch.device("cpu")
_KEPT = {}  # address of a storage → its device, and what keeps the address from being used again
_ACROSS = {"copy_", "_to_copy", "_local_scalar_dense", "detach", "is_same_size", "lift_fresh", "set_", "set_data"}
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}


def device_of(t):
    """Where it pretends to be."""
    return _KEPT.get(t.untyped_storage()._cdata, (CPU, None))[0]


def put(t, device):
    """Let it pretend to be there, with all that shares its storage."""
    storage = t.untyped_storage()
    _KEPT[storage._cdata] = (torch.device(device), StorageWeakRef(storage))
    return t


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t, device):
        ctx.source = device_of(t)
        return put(torch._C._VariableFunctions.clone(t), device)

    @staticmethod
    def backward(ctx, g):
        return put(g.clone(), ctx.source), None


class _Moves(TorchFunctionMode):
    """`Tensor.to` of a device moves; what is made on a device is there."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.to:
            types = [a for a in args[1:] if isinstance(a, torch.dtype)]
            places = [a for a in (*args[1:], kwargs.pop("device", None)) if isinstance(a, str | torch.device)]
            kwargs.pop("non_blocking", None)
            out = func(args[0], *types, **kwargs) if types or kwargs else args[0]
            return _Move.apply(out, places[0]) if places and device_of(out) != torch.device(places[0]) else out
        device = kwargs.get("device")
        if device is None or torch.device(device).type != "cuda":
            return func(*args, **kwargs)
        return put(func(*args, **{**kwargs, "device": "cpu"}), device)


class _Rules(TorchDispatchMode):
    """Tensors of one device alone meet, but for copies, numbers and indices on the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        tensors = _tensors((args, kwargs))
        devices = {device_of(t) for t in tensors if t.dim() or device_of(t) != CPU}
        if name in _INDEXED:
            devices = {device_of(args[0])} | ({device_of(t) for t in args[1] if t is not None} - {CPU})
        if name in _ACROSS:
            devices = {device_of(tensors[0])}
        if len(devices) > 1:
            found = ", ".join(sorted(map(str, devices)))
            raise RuntimeError(f"Expected all tensors to be on the same device, but found {found} in {name}")
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage()._cdata for t in tensors}
        for t in _tensors(out):
            if t.untyped_storage()._cdata not in known:
                put(t, next(iter(devices), CPU))
        return out


def _tensors(tree):
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


@contextlib.contextmanager
def pretending(monkeypatch):
    """Within, tensors are where `put` said."""
    with monkeypatch.context() as m, _Rules(), _Moves():
        m.setattr(torch.Tensor, "device", property(device_of))
        m.setattr(torch.Tensor, "is_cuda", property(lambda t: device_of(t).type == "cuda"))
        m.setattr(torch, "is_autocast_enabled", lambda *_: False)
        forked, backward = torch.random.fork_rng, torch.autograd._engine_run_backward
        m.setattr(torch.random, "fork_rng", lambda **_: forked(devices=[]))

        def run(*args, **kwargs):  # in it, function modes are off
            with _Moves():
                return backward(*args, **kwargs)

        m.setattr(torch.autograd, "_engine_run_backward", run)
        yield
