"""Times and memory on a device: every way in turn, several rounds, medians."""

from __future__ import annotations

import gc
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

import torch

from guided_dropout.provenance import provenance

# Cycles of a GPU, about 2 ms: in them the CPU launches what is timed. Clearing the cache takes a fast GPU 70 µs, the
# Python of one kernel as long.
_AHEAD = 4_000_000

Ways = Mapping[str, Callable[[], Any]]


def interleaved(ways: Ways, device: torch.device, *, rounds: int, cold: bool = False) -> dict[str, dict[str, Any]]:
    """Run each way once to warm up, then `rounds` times in turn.

    Args:
        ways: name → what to run. One that does not fit the memory is recorded as such and left out.
        device: where it runs: CUDA events there, the wall clock on a CPU.
        rounds: runs of each.
        cold: clear the L2 cache before each run; the CPU runs ahead meanwhile, so that short kernels are not timed by
            how fast they are launched.

    Returns:
        name → ``median_s``, ``all_s`` and, on a GPU, ``peak_bytes`` above what was allocated before.
    """
    found: dict[str, dict[str, Any]] = {}
    runnable = {}
    for name, run in ways.items():
        try:
            run()
            found[name] = {"all_s": [], **_peak(run, device)}
            runnable[name] = run
        except torch.OutOfMemoryError:
            found[name] = {"failed": "out of memory"}
            free()
    for _ in range(rounds):
        for name, run in runnable.items():
            found[name]["all_s"].append(_seconds(run, device, cold=cold))
    for name in runnable:
        found[name]["median_s"] = statistics.median(found[name]["all_s"])
    return found


def ratios(found: Mapping[str, Mapping[str, Any]], of: str) -> dict[str, float]:
    """Median of `of` over the median of each other way that ran."""
    if "median_s" not in found[of]:
        return {}
    return {name: found[of]["median_s"] / f["median_s"] for name, f in found.items() if name != of and "median_s" in f}


def _seconds(run: Callable[[], Any], device: torch.device, *, cold: bool) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if cold:
        torch.empty(256 << 20, dtype=torch.uint8, device=device).zero_()
        torch.cuda._sleep(_AHEAD)
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def _peak(run: Callable[[], Any], device: torch.device) -> dict[str, int]:
    if device.type != "cuda":
        return {}
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return {"peak_bytes": torch.cuda.max_memory_allocated() - before}


def free() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def machine(device: torch.device) -> dict[str, Any]:
    """Hardware, versions, date."""
    facts: dict[str, Any] = {"device": device.type, "cuda": torch.version.cuda, "hip": torch.version.hip}
    try:
        facts["triton"] = metadata.version("triton")
    except metadata.PackageNotFoundError:
        facts["triton"] = None
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        facts |= {
            "card": card.name,
            "capability": f"{card.major}.{card.minor}",
            "processors": card.multi_processor_count,
            "memory_bytes": card.total_memory,
        }
    return provenance(**facts)


def folder_name(device: torch.device) -> str:
    """``nvidia-h100-80gb-hbm3`` for a card, ``cpu-x86_64`` for a CPU."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu-{platform.machine()}"
    return re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-")
