"""The C kernel ``squares.c``: built on first use for this very machine, kept in the user's cache, called by ctypes.

Without a compiler, or with ``GUIDED_DROPOUT_KERNEL=off``, there is none, and `takes` says so. On processors with AMX
products go through its units where that is faster (``squares_amx.h``), unless ``GUIDED_DROPOUT_KERNEL=portable``.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from guided_dropout.artefacts import staged_file
from guided_dropout.errors import GuidedDropoutError
from guided_dropout.fisher.layout import Layout

_SOURCE, *_INCLUDED = (Path(__file__).with_name(name) for name in ("squares.c", "squares_amx.h"))
_FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")
_TUNING = (("-march=native",), ("-march=native", "-DWITHOUT_AMX"), ("-mcpu=native",), ())  # the first that builds
# Time of a multiplication in AMX's units, in those of the vector units, measured; and what they round sizes up to.
_AMX_TIME = {torch.float32: 0.6, torch.bfloat16: 0.3}
_AMX_STEP = 32


def takes(total: Tensor | None, left: Tensor, right: Tensor) -> bool:
    """Whether the kernel could be built and suits these: on a CPU, float32 or, with AMX, bfloat16; a float32 total."""
    kinds = {(t.device.type, t.dtype) for t in (left, right)}
    suited = total is None or (total.device.type == "cpu" and total.dtype == torch.float32 and total.is_contiguous())
    return (
        suited and (kinds == {("cpu", torch.float32)} or (kinds == {("cpu", torch.bfloat16)} and has_amx())) and built()
    )


def square_accumulate(total: Tensor | None, sums: Tensor | None, left: Tensor, right: Tensor, layout: Layout) -> None:
    """`kernels.square_accumulate` for what `takes` takes."""
    kernel = _kernel()
    assert kernel is not None
    outputs = [None if t is None else t.data_ptr() for t in (total, sums)]
    half = left.dtype == torch.bfloat16
    with _inputs(left, right, layout) as inputs:
        if half or in_amx(left, right, layout):
            failed = kernel.square_accumulate_amx(*outputs, *inputs, half)
        else:
            failed = kernel.square_accumulate(*outputs, *inputs)
    if failed:
        raise MemoryError("no memory for the kernel's buffers")


def products_time(left: Tensor, right: Tensor, layout: Layout) -> float:
    """Of `square_accumulate`, in multiplications by the vector units, to which half precision may be widened."""
    m, n = left.shape[1], right.shape[1]
    by_vectors = layout.offsets[-1] * m * n
    if not has_amx():
        return by_vectors
    rows = sum(_rounded_up(span.stop - span.start) for _, span in layout.spans())
    return min(by_vectors, _AMX_TIME[left.dtype] * rows * _rounded_up(m) * _rounded_up(n))


def in_amx(left: Tensor, right: Tensor, layout: Layout) -> bool:
    """Whether there is AMX and it is the faster one."""
    return products_time(left, right, layout) < layout.offsets[-1] * left.shape[1] * right.shape[1]


def _rounded_up(size: int) -> int:
    return -(-size // _AMX_STEP) * _AMX_STEP


def gram_sums(sums: Tensor, left: Tensor, right: Tensor, layout: Layout) -> None:
    """Add each sample's sum of squares to `sums` by the Gram identity of `kernels`, for what `takes` takes."""
    kernel = _kernel()
    assert kernel is not None
    with _inputs(left, right, layout) as inputs:
        kernel.gram_sums(sums.data_ptr(), *inputs)


@contextlib.contextmanager
def _inputs(left: Tensor, right: Tensor, layout: Layout) -> Iterator[list[int]]:
    """What both of the kernel's functions take; it stays in memory within."""
    left, right = _dense_rows(left), _dense_rows(right)
    offsets = torch.tensor(layout.offsets, device="cpu")
    rows = layout.row_numbers(left.device).contiguous()
    yield [
        left.data_ptr(),
        left.stride(0),
        right.data_ptr(),
        right.stride(0),
        rows.data_ptr(),
        offsets.data_ptr(),
        layout.num_samples,
        left.shape[1],
        right.shape[1],
        torch.get_num_threads(),
    ]


def _dense_rows(x: Tensor) -> Tensor:
    """`x` with elements of a row side by side; rows may lie anywhere."""
    return x if x.stride(1) == 1 else x.contiguous()


def built() -> bool:
    """Whether there is a kernel, and it is wanted."""
    return _wanted() != "off" and _kernel() is not None


def has_amx() -> bool:
    """Whether there is one, and the processor, the system and the user let it use AMX."""
    kernel = _kernel() if _wanted() not in ("off", "portable") else None
    return kernel is not None and _allows_amx(kernel)


def _wanted() -> str:
    return os.environ.get("GUIDED_DROPOUT_KERNEL", "").lower()


@functools.cache
def _allows_amx(kernel: ctypes.CDLL) -> bool:
    return bool(kernel.has_amx())


@functools.cache
def _kernel() -> ctypes.CDLL | None:
    """The kernel, built if need be; None where it cannot be."""
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    if sys.platform == "win32" or shutil.which(compiler[0]) is None:
        return None
    for tuning in _TUNING:
        try:
            library = ctypes.CDLL(str(_built(compiler, tuning)))
        except (OSError, subprocess.SubprocessError, GuidedDropoutError):
            continue
        p, i = ctypes.c_void_p, ctypes.c_int64
        inputs = [p, i, p, i, p, p, i, i, i, ctypes.c_int]
        library.square_accumulate.argtypes = [p, p, *inputs]
        library.square_accumulate.restype = ctypes.c_int
        library.gram_sums.argtypes = [p, *inputs]
        library.gram_sums.restype = None
        if library.has_amx():
            library.square_accumulate_amx.argtypes = [p, p, *inputs, ctypes.c_int]
            library.square_accumulate_amx.restype = ctypes.c_int
        return library
    return None


def _built(compiler: list[str], tuning: tuple[str, ...]) -> Path:
    """The library's path, after building it unless this source was built for this machine before."""
    command = [*compiler, *_FLAGS, *tuning]
    code = b"".join(path.read_bytes() for path in (_SOURCE, *_INCLUDED))
    key = hashlib.sha256(code + repr((command, _machine())).encode()).hexdigest()[:16]
    library = cache_folder() / f"squares-{key}.so"
    if not library.exists():
        with staged_file(library) as tmp:
            subprocess.run([*command, "-o", str(tmp), str(_SOURCE)], check=True, capture_output=True, timeout=120)
    return library


def release_memory() -> None:
    """Give what the allocator keeps for later back to the system, where it can (glibc)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def cache_folder() -> Path:
    """Where built kernels are kept: ``$XDG_CACHE_HOME/guided-dropout``, by default below ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "guided-dropout"


def _machine() -> str:
    """What the code is tuned to: a home folder may be shared by machines with other processors."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.platform() + platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "") + platform.machine()
