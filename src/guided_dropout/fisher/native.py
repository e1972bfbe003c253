"""The C kernel ``squares.c``, called by ctypes.

Where it cannot be built (`build`), or with ``GUIDED_DROPOUT_KERNEL=off``, there is none, and `takes` says so. On
processors with AMX products go through its units where that is faster (``squares_amx.h``, ``products_amx.h``), unless
``GUIDED_DROPOUT_KERNEL=portable``. Its attention is called by `heads`, its cross-entropy by `crossentropy`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from guided_dropout.fisher import build
from guided_dropout.fisher.layout import Layout

# Time of a multiplication in AMX's units, in those of the vector units, measured; and what they round sizes up to.
_AMX_TIME = {torch.float32: 0.55, torch.bfloat16: 0.3}
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
    kernel = library()
    assert kernel is not None
    assert sums is None or (sums.is_contiguous() and sums.dtype == torch.float64)
    outputs = [None if t is None else t.data_ptr() for t in (total, sums)]
    half = left.dtype == torch.bfloat16
    with _inputs(left, right, layout) as inputs:
        if half or in_amx(left, right, layout):
            failed = kernel.square_accumulate_amx(*outputs, *inputs, half)
        else:
            failed = kernel.square_accumulate(*outputs, *inputs)
    if failed:
        raise MemoryError("no memory for the kernel's buffers")


def multiply(x: Tensor, matrix: Tensor, bias: Tensor | None = None, listed: Tensor | None = None) -> Tensor:
    """``x @ matrix + bias`` in AMX, where `has_amx`: [R, k] by [k, n], k > 0, all float32 on a CPU.

    Args:
        x: the rows.
        matrix: what they are multiplied by.
        bias: [n], or what broadcasts to it.
        listed: [K] int64, the numbers of the rows that are multiplied, in ascending order; the others come out as
            zero. None: all of them.
    """
    kernel = library()
    assert kernel is not None
    if listed is not None and not len(listed):  # which has no address
        return x.new_zeros(len(x), matrix.shape[1])
    turned = matrix.stride(1) != 1
    x, w = _dense_rows(x), _dense_rows(matrix.T if turned else matrix)
    bias = None if bias is None else bias.expand(matrix.shape[1]).contiguous()
    out = x.new_empty(len(x), matrix.shape[1])
    optional = [None if t is None else t.data_ptr() for t in (bias, listed)]
    inputs = [x.data_ptr(), x.stride(0), w.data_ptr(), w.stride(0), *optional]
    sizes = [0 if listed is None else len(listed), len(x), x.shape[1], out.shape[1]]
    if kernel.multiply_amx(out.data_ptr(), *inputs, *sizes, turned, torch.get_num_threads()):
        raise MemoryError("no memory for the kernel's buffers")
    return out


def norm_sums(g: Tensor, x: Tensor, layout: Layout, eps: float, *, centred: bool) -> tuple[Tensor, Tensor]:
    """Each sample's sums [B, n] of `g` times the normalised `x`, both [R, n] float32 on a CPU, and of `g`.

    Args:
        g: a norm's output's gradient, without its weight.
        x: its input.
        layout: which rows are whose.
        eps: added to a row's variance, or to its mean square.
        centred: whether a row's mean is taken off (layer norm).
    """
    kernel = library()
    assert kernel is not None
    weight, bias = g.new_empty(2, layout.num_samples, g.shape[1])
    room = g.new_empty(layout.offsets[-1], 2)
    with _inputs(g, x, layout) as (of_g, g_stride, of_x, x_stride, rows, offsets, samples, width, _, threads):
        at = [t.data_ptr() for t in (weight, bias, room)]
        kernel.norm_sums(*at, of_g, g_stride, of_x, x_stride, rows, offsets, samples, width, eps, centred, threads)
    return weight, bias


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


def gram_sums(left: Tensor, right: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """By the Gram identity of `kernels`, for what `takes` takes: each sample's sum of squares, and of terms' sizes."""
    kernel = library()
    assert kernel is not None
    found, sizes = left.new_zeros(2, layout.num_samples, dtype=torch.float64)
    with _inputs(left, right, layout) as inputs:
        kernel.gram_sums(found.data_ptr(), sizes.data_ptr(), *inputs)
    return found, sizes


@contextlib.contextmanager
def _inputs(left: Tensor, right: Tensor, layout: Layout) -> Iterator[list[int]]:
    """What the kernel's functions of two matrices of rows take; it stays in memory within."""
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
    return _wanted() != "off" and library() is not None


def has_amx() -> bool:
    """Whether there is one, and the processor, the system and the user let it use AMX."""
    kernel = library() if _wanted() not in ("off", "portable") else None
    return kernel is not None and _allows_amx(kernel)


def _wanted() -> str:
    return os.environ.get("GUIDED_DROPOUT_KERNEL", "").lower()


@functools.cache
def _allows_amx(kernel: ctypes.CDLL) -> bool:
    return bool(kernel.has_amx())


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernel, built if need be; None where it cannot be."""
    return build.load(_declare)


def _declare(library: ctypes.CDLL) -> None:
    p, i = ctypes.c_void_p, ctypes.c_int64
    inputs = [p, i, p, i, p, p, i, i, i, ctypes.c_int]
    library.square_accumulate.argtypes = [p, p, *inputs]
    library.square_accumulate.restype = ctypes.c_int
    library.gram_sums.argtypes = [p, p, *inputs]
    library.gram_sums.restype = None
    library.attend.argtypes = [p, ctypes.c_int, ctypes.c_int]
    library.attend.restype = ctypes.c_int
    library.norm_sums.argtypes = [p, p, p, p, i, p, i, p, p, i, i, ctypes.c_float, ctypes.c_int, ctypes.c_int]
    library.norm_sums.restype = None
    library.exponential_sums.argtypes = [p, p, i, i, i, ctypes.c_int]
    library.exponential_sums.restype = None
    library.cross_entropy_gradient.argtypes = [p, i, p, p, p, i, i, ctypes.c_int]
    library.cross_entropy_gradient.restype = None
    if library.has_amx():
        library.square_accumulate_amx.argtypes = [p, p, *inputs, ctypes.c_int]
        library.square_accumulate_amx.restype = ctypes.c_int
        library.multiply_amx.argtypes = [p, p, i, p, i, p, p, i, i, i, i, ctypes.c_int, ctypes.c_int]
        library.multiply_amx.restype = ctypes.c_int


def release_memory() -> None:
    """Give what the allocator keeps for later back to the system, where it can (glibc)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
