"""The kernel alone: right on this device, and how far from what the device can do."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from measure import free, interleaved, ratios
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
# (what, m, n, rows of each sample, samples)
LAYERS = [
    ("BERT-base attention, 128 tokens", 768, 768, 128, 32),
    ("BERT-base MLP, 128 tokens", 3072, 768, 128, 32),
    ("BERT-base head, 19 targets", 30522, 768, 19, 32),
    ("BERT-base attention, 512 tokens", 768, 768, 512, 16),
    ("BERT-base MLP, 512 tokens", 768, 3072, 512, 16),
    ("Llama 1B key, 512 tokens", 512, 2048, 512, 8),
    ("Llama 1B query, 512 tokens", 2048, 2048, 512, 8),
    ("Llama 1B MLP, 512 tokens", 8192, 2048, 512, 8),
    ("Llama 1B head 32k, 511 targets", 32000, 2048, 511, 8),
    ("Llama 1B head 128k, 511 targets", 128256, 2048, 511, 8),
]
ALL_PRECISIONS = ("Llama 1B query, 512 tokens", "tiny")
QUICK_LAYERS = [("tiny", 24, 40, 9, 3)]
# The first in each type, precision and tile size, the others as they are used.
RAGGED = [(768, 3072, [128, 0, 1, 77, 512, 16]), (1000, 51, [3, 200, 64]), (30522, 768, [19, 25, 1, 0, 18])]
QUICK_RAGGED = [(21, 40, [5, 0, 1, 17]), (3, 50, [2, 33])]


def correctness(device: torch.device, *, quick: bool) -> dict[str, Any]:
    """Relative errors of each type, precision and tile size against float64; the norm's, and the worst element's."""
    from guided_dropout.fisher import triton_kernel as kernel

    rows = []
    for i, (m, n, lengths) in enumerate(QUICK_RAGGED if quick else RAGGED):
        offsets = (0, *accumulate(lengths))
        kinds = _kinds(kernel.PRECISIONS)
        for dtype, precision, limit in kinds if i == 0 else kinds[:3]:
            g = torch.Generator(device).manual_seed(0)
            left, right = (torch.randn(offsets[-1], d, generator=g, device=device).to(dtype) for d in (m, n))
            gradients = [left[s:e].double().T @ right[s:e].double() for s, e in pairwise(offsets)]
            want = 1.0 + torch.stack(gradients).square().sum(0)
            sums = torch.stack([x.square().sum() for x in gradients])
            for config in kernel.CONFIGS if i == 0 and not quick else [None]:
                total = torch.ones(m, n, device=device)
                kernel.square_accumulate(total, left, right, offsets, precision=precision, config=config)
                found = kernel.square_sums(left, right, offsets, precision=precision, config=config)
                errors = {
                    "norm": ((total - want).norm() / want.norm()).item(),
                    "worst": ((total - want).abs().max() / want.abs().max()).item(),
                    "sums": ((found - sums).abs().max() / sums.max()).item(),
                }
                kind = {"m": m, "n": n, "lengths": lengths, "dtype": str(dtype), "precision": precision}
                right_enough = max(errors.values()) <= limit
                rows.append({**kind, "config": str(config), **errors, "limit": limit, "ok": right_enough})
            del gradients, want
            free()
    return {"ok": all(r["ok"] for r in rows), "largest": max(rows, key=lambda r: r["norm"] / r["limit"]), "rows": rows}


def _kinds(precisions: tuple[str, ...]) -> list[tuple[torch.dtype, str, float]]:
    """(type, precision, what the relative error may be)."""
    half = [(dtype, precisions[0], 2e-5) for dtype in HALF]
    return half + [(torch.float32, p, 1e-2 if p == "tf32" else 2e-5) for p in precisions]


def roofline(device: torch.device, *, quick: bool) -> dict[str, Any]:
    """The kernel's time at real layers' shapes beside a plain weight gradient's, and beside the device's limits."""
    from guided_dropout.fisher import triton_kernel as kernel

    limits = _limits(device, quick=quick)
    rows = []
    for what, m, n, length, samples in QUICK_LAYERS if quick else LAYERS:
        offsets = tuple(length * b for b in range(samples + 1))
        for dtype in (torch.bfloat16, torch.float32):
            left, right = (torch.randn(offsets[-1], d, device=device).to(dtype) for d in (m, n))
            total = torch.zeros(m, n, device=device)
            ways: dict[str, Callable[[], Any]] = {
                "kernel": partial(kernel.square_accumulate, total, left, right, offsets),
            }
            if dtype == torch.float32:
                for p in kernel.PRECISIONS[1:] if what in ALL_PRECISIONS else ["tf32"]:
                    ways[f"kernel, {p}"] = partial(kernel.square_accumulate, total, left, right, offsets, precision=p)
            ways["kernel, sums only"] = partial(kernel.square_sums, left, right, offsets)
            ways["plain weight gradient"] = partial(torch.mm, left.T, right)
            ways["one sample after the other"] = partial(_one_by_one, total, left, right, offsets)
            found = interleaved(ways, device, rounds=2 if quick else 10, cold=True)
            flops = 2 * m * n * offsets[-1]
            moved = (left.nbytes + right.nbytes) + 2 * total.nbytes
            peaks = limits["flops_per_s"]
            peak = max(peaks[str(dtype)], peaks.get("tf32", 0) / 3 if dtype == torch.float32 else 0)  # tf32x3
            rows.append({
                "layer": what, "m": m, "n": n, "rows": length, "samples": samples, "dtype": str(dtype), "times": found,
                "flops": flops, "bytes": moved, "roofline_s": max(flops / peak, moved / limits["bytes_per_s"]),
                "kernel_over": ratios(found, "kernel"),
            })  # fmt: skip
            del left, right, total, ways
            free()
    return {"limits": limits, "rows": rows}


def _one_by_one(total: Tensor, left: Tensor, right: Tensor, offsets: tuple[int, ...]) -> None:
    """What the kernel replaces."""
    product = left.new_empty(total.shape)
    for s, e in pairwise(offsets):
        torch.mm(left[s:e].T, right[s:e], out=product)
        total.addcmul_(product, product)


def _limits(device: torch.device, *, quick: bool) -> dict[str, Any]:
    """What this device does: multiplications of square matrices, and copies."""
    size = 64 if quick else 8192
    flops = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        found = interleaved({"mm": partial(torch.mm, a, b)}, device, rounds=5)
        flops[str(dtype)] = 2 * size**3 / found["mm"]["median_s"]
    if device.type == "cuda":
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        a, b = (torch.randn(size, size, device=device) for _ in range(2))
        found = interleaved({"mm": partial(torch.mm, a, b)}, device, rounds=5)
        flops["tf32"] = 2 * size**3 / found["mm"]["median_s"]
        torch.set_float32_matmul_precision(before)
    source = torch.zeros((1 << 20) if quick else (1 << 30), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = interleaved({"copy": partial(target.copy_, source)}, device, rounds=5)
    assert all(math.isfinite(f) for f in flops.values())
    return {"flops_per_s": flops, "bytes_per_s": 2 * source.nbytes / copy["copy"]["median_s"]}
