"""The C kernel ``squares.c``: built on first use for this very machine, kept in the user's cache, called by ctypes.

Without a compiler, or with ``GUIDED_DROPOUT_KERNEL=off``, there is none, and `takes` says so.
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

_SOURCE = Path(__file__).with_name("squares.c")
_FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")
_TUNING = (("-march=native",), ("-mcpu=native",), ())


def takes(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the kernel could be built and suits these: on a CPU, matrices of `dtype`, a float32 total."""
    kinds = {(t.device.type, t.dtype) for t in (left, right)}
    suited = total is None or (total.device.type == "cpu" and total.dtype == torch.float32 and total.is_contiguous())
    return suited and kinds == {("cpu", dtype)} and _kernel() is not None


def square_accumulate(total: Tensor | None, sums: Tensor | None, left: Tensor, right: Tensor, layout: Layout) -> None:
    """`kernels.square_accumulate` for what `takes` takes."""
    kernel = _kernel()
    assert kernel is not None
    outputs = [None if t is None else t.data_ptr() for t in (total, sums)]
    with _inputs(left, right, layout) as inputs:
        failed = kernel.square_accumulate(*outputs, *inputs)
    if failed:
        raise MemoryError("no memory for the kernel's buffers")


def add_squares(total: Tensor | None, sums: Tensor | None, products: Tensor) -> None:
    """Add the squares of products [B, ...] bfloat16, contiguous, to `total` [...] and their sums to `sums` [B]."""
    kernel = _kernel()
    assert kernel is not None
    outputs = [None if t is None else t.data_ptr() for t in (total, sums)]
    kernel.add_squares_of_bfloat16(
        *outputs, products.data_ptr(), len(products), products[0].numel(), torch.get_num_threads()
    )


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


@functools.cache
def _kernel() -> ctypes.CDLL | None:
    """The kernel, built if need be; None where it cannot be."""
    if os.environ.get("GUIDED_DROPOUT_KERNEL", "").lower() == "off":
        return None
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
        library.add_squares_of_bfloat16.argtypes = [p, p, p, i, i, ctypes.c_int]
        library.add_squares_of_bfloat16.restype = None
        return library
    return None


def _built(compiler: list[str], tuning: tuple[str, ...]) -> Path:
    """The library's path, after building it unless this source was built for this machine before."""
    command = [*compiler, *_FLAGS, *tuning]
    key = hashlib.sha256(_SOURCE.read_bytes() + repr((command, _machine())).encode()).hexdigest()[:16]
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
