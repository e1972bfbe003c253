"""One measurement, in a process of its own."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import statistics
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.fisher.cases import Case, Sample
from benchmarks.fisher.methods import Method, UnavailableError
from benchmarks.fisher.table import FLOORS, YARDSTICKS, Entry, entry
from guided_dropout.artefacts import read_tensors, write_json, write_tensors

# A tensor this much smaller than the largest one has a gradient of zero, but for float64's rounding (a key's bias).
_ZERO = 1e-16
_WRONG = 1e-2


def oracle(case: Case, folder: str | None) -> dict[str, Tensor]:
    """The Fisher of the checked samples in float64: the model's own loss, one sample at a time, plain autograd."""
    model = case.model(folder, dtype=torch.float64)
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for s in case.samples()[: case.check]:
        model.zero_grad(set_to_none=True)
        model(input_ids=s["input_ids"][None], labels=s["labels"][None]).loss.backward()
        for n, p in model.named_parameters():
            if p.grad is not None:
                total[n].addcmul_(p.grad, p.grad)
    return {n: t / case.check for n, t in total.items()}


def accuracy(found: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, Any]:
    r"""Per tensor :math:`\|\hat F - F\| / \|F\|`; of a tensor's sum where that is all there is."""
    norms = {n: t.norm().item() for n, t in truth.items()}
    largest = max(norms.values())
    zero = {n for n in truth if norms[n] <= _ZERO * largest}
    errors = {}
    for name, value in found.items():
        if name not in zero:
            want = truth[name] if value.dim() else truth[name].sum()
            errors[name] = ((value.double() - want).norm() / want.norm()).item()
    broken = sorted(n for n, e in errors.items() if e != e)
    finite = {n: e for n, e in errors.items() if e == e}
    worst = max(finite, key=finite.__getitem__, default=None)
    size = sum(t.numel() for t in truth.values())
    wrong = [n for n, e in finite.items() if e > _WRONG]
    return {
        "worst": finite[worst] if worst else None,
        "worst_tensor": worst,
        "median": statistics.median(finite.values()) if finite else None,
        "wrong": {"above": _WRONG, "tensors": wrong, "parameters": sum(truth[n].numel() for n in wrong) / size},
        "not_finite": broken,
        "missing": [n for n in truth if n not in found],
        "covered": sum(t.numel() for n, t in truth.items() if n in found) / size,
        "tensors": len(truth),
        "true_zeros": {
            "tensors": sorted(zero),
            "largest": max((found[n].norm().item() / largest for n in zero if n in found), default=0.0),
        },
    }


def time_methods(
    case: Case,
    entries: list[Entry],
    truth: Mapping[str, Tensor] | None,
    *,
    rounds: int,
    seconds: float,
    folder: str | None,
) -> dict[str, Any]:
    """Time `entries`, the floors and this project's method in turn, each on its own copy of the model.

    All take as many samples in a round as the one that takes most.

    Args:
        case: what is run.
        entries: the methods.
        truth: the oracle's Fisher; None where there are only floors.
        rounds: at most so many, and at least two.
        seconds: no new round begins after that long.
        folder: of the weights.
    """
    samples = case.samples()
    results: dict[str, Any] = {}
    ready: dict[str, Method] = {}
    beside = FLOORS if any(e.environment for e in entries) else YARDSTICKS  # a changed environment would change it
    for e in (*(entry(y) for y in beside), *(e for e in entries if e.name not in beside)):
        try:
            method = e.make(case.model(folder), case.objective, samples)
            method.step(samples[: case.check])
            fisher = method.fisher()
        except Exception as error:
            results[e.name] = _reason(error)
            continue
        ready[e.name] = method
        if fisher is not None and truth is not None:
            results[e.name] = {"accuracy": accuracy(fisher, truth)}
        del fisher
    times: dict[str, list[float]] = {name: [] for name in ready}
    # Beside a step of many batches one of a single batch would be measured cold: memory, caches, the units' clock.
    many = max(method.repeats for method in ready.values())
    gc.freeze()  # what was imported need not be looked through before each step
    begun = time.perf_counter()
    for i in range(rounds):
        if i >= 2 and time.perf_counter() - begun > seconds:
            break
        names = list(times)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            gc.collect()
            try:
                times[name].append(_timed(ready[name], samples, many // ready[name].repeats))
            except Exception as error:
                results[name] = _reason(error)
                del times[name], ready[name]
    for name, values in times.items():
        results.setdefault(name, {})["timing"] = {
            "seconds_per_sample": _spread(values),
            **{
                f"ratio_to_{y.replace('-', '_')}": _spread([v / w for v, w in zip(values, times[y], strict=True)])
                for y in beside
                if y in times
            },
            "rounds": len(values),
            **ready[name].facts(),
            "beside": [n for n in times if n != name],
        }
    return {e.name: results[e.name] for e in entries}


def _timed(method: Method, samples: list[Sample], steps: int) -> float:
    """Seconds a sample."""
    start = time.perf_counter()
    for _ in range(steps):
        method.step(samples)
    return (time.perf_counter() - start) / (len(samples) * method.repeats * steps)


def _spread(values: list[float]) -> dict[str, Any]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": statistics.median(values), "q25": low, "q75": high, "all": values}


def peak_memory(case: Case, e: Entry, folder: str | None) -> dict[str, Any]:
    """Peak resident memory of a batch, above the resident memory of the loaded model.

    It holds whatever the method adds to the model: what it prepared and keeps, activations, gradients, sums. The peak
    of the preparation itself is given apart. Before the model's memory is read, one sample goes forward and backward
    and what is free is given back to the system, so that threads, code and buffers are there for all alike.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        raise UnavailableError("peak memory is read from Linux's /proc")
    for name in e.make.imports:
        importlib.import_module(name)
    model = case.model(folder)
    for p in model.parameters():
        p.data = p.data.clone()  # resident, not mapped from a file
    samples = case.samples()
    first = {k: v[None] for k, v in samples[0].items()}
    model(**first).loss.backward()
    model.zero_grad(set_to_none=True)
    _trim()
    base = _kib(status, "VmRSS")
    _reset_peak()
    method = e.make(model, case.objective, samples)
    method.repeats = 1
    prepared = _kib(status, "VmHWM")
    _trim()
    _reset_peak()
    method.step(samples[:1])  # makes the sums
    method.step(samples)
    return {
        "peak_mib": (_kib(status, "VmHWM") - base) / 1024,
        "preparation_peak_mib": (prepared - base) / 1024,
        "model_mib": sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20,
    }


def _kib(status: Path, field: str) -> int:
    (line,) = (row for row in status.read_text().splitlines() if row.startswith(field + ":"))
    return int(line.split()[1])


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _trim() -> None:
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _limit_memory(share: float = 0.85) -> None:
    """A method that wants more memory than there is gets an error that can be recorded, rather than being killed."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        free = _kib(Path("/proc/meminfo"), "MemAvailable") + _kib(Path("/proc/self/status"), "VmData")
        limit = int(share * free) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _reason(error: Exception) -> dict[str, str]:
    lines = str(error).strip().splitlines() or ["no message"]
    text = lines[0] if len(lines[0]) < 200 else lines[0][:200] + "…"
    if isinstance(error, UnavailableError):
        return {"skipped": text}
    if isinstance(error, ModuleNotFoundError):
        return {"skipped": f"{error.name} is not installed"}
    return {"failed": f"{type(error).__name__}: {text}"}


def work(job: dict[str, Any], out: Path, log: Path) -> None:
    """Do a job and write what came out as JSON; what is printed goes to `log`."""
    with log.open("w") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    warnings.simplefilter("ignore")
    os.environ.update(job["environment"])
    case, folder, truth = Case(**job["case"]), job["folder"], job["oracle"]
    entries = [entry(name) for name in job["methods"]]
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    _limit_memory()
    load = os.getloadavg()[0]
    results: dict[str, Any] = {}
    if job["part"] == "oracle":
        write_tensors(truth, oracle(case, folder))
    elif job["part"] == "timing":
        known = read_tensors(truth) if truth else None
        results = time_methods(case, entries, known, rounds=job["rounds"], seconds=job["seconds"], folder=folder)
    else:
        (e,) = entries
        try:
            results = {e.name: {"memory": peak_memory(case, e, folder)}}
        except Exception as error:
            results = {e.name: _reason(error)}
    for r in results.values():
        r.update(load_before=load, threads=torch.get_num_threads())
    write_json(out, results)
