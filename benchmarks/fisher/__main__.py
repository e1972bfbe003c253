"""``python -m benchmarks.fisher``: measure what is missing; one JSON file per case and method, and a summary."""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.fisher.cases import CORE, Case, find_cases
from benchmarks.fisher.measure import work
from benchmarks.fisher.summary import KIND, SCHEMA, summary
from benchmarks.fisher.table import FLOORS, Entry, find_entries
from guided_dropout.artefacts import read_json, write_json, write_text
from guided_dropout.provenance import provenance

# Each measurement has a fresh process; a server that has imported torch forks it, which saves seconds each time.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["benchmarks.fisher.measure"])
ROOT = Path(__file__).resolve().parents[2]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.fisher", description=__doc__)
    p.add_argument("--quick", action="store_true", help="tiny models: does everything run?")
    p.add_argument("--cases", nargs="+", metavar="GLOB", help="names of cases; '*' for the whole grid")
    p.add_argument("--methods", nargs="+", metavar="GLOB", help="names of methods, whatever the case's level")
    p.add_argument(
        "--model", metavar="DIR", help="a BERT masked LM in place of random weights, where a case has its shape"
    )
    p.add_argument("--out", type=Path, help="folder of the results")
    p.add_argument("--rounds", type=int, default=7, help="at most so many rounds (at least 2 are done)")
    p.add_argument("--seconds", type=float, default=60, help="no new round begins after that long (alone: a third)")
    p.add_argument("--timeout", type=float, default=900, help="seconds for one process")
    p.add_argument("--threads", type=int, help="torch's threads; its own choice by default")
    p.add_argument("--retry", action="store_true", help="measure again what failed or was skipped")
    p.add_argument("--summary", action="store_true", help="only write the summary of what there is")
    args = p.parse_args(argv)
    name = "build/fisher-speed-quick" if args.quick else "benchmarks/results/fisher-speed"
    args.out = args.out or ROOT / name
    return args


def main(argv: list[str] | None = None) -> None:
    """Case after case, part after part."""
    args = arguments(argv)
    if args.model and not (Path(args.model) / "config.json").exists():
        sys.exit(f"{args.model} has no config.json; expected the folder of a BERT masked LM")
    cases = find_cases(args.cases, quick=args.quick)
    if not cases:
        sys.exit(f"no case matches {args.cases}; expected some of {', '.join(c.name for c in find_cases(['*']))}")
    if not args.summary:
        for case in cases:
            Run(case, args).all()
    write_text(args.out / "README.md", summary(args.out))
    print(f"summary: {args.out / 'README.md'}")


class Run:
    """Everything of one case."""

    def __init__(self, case: Case, args: argparse.Namespace):
        self.case, self.args = case, args
        self.entries = find_entries(case, args.methods)
        self.facts = {
            "kind": KIND,
            "schema": SCHEMA,
            "case": case.facts(args.model),
            "hardware": hardware(),
            "revision": _revision(),
            "provenance": provenance(),
        }

    def all(self) -> None:
        """The oracle, the timings, the peaks of memory."""
        timing = [e for e in self.entries if self._missing(e, "timing")]
        with tempfile.TemporaryDirectory(prefix="fisher-oracle-") as folder:
            truth = str(Path(folder) / "fisher.safetensors")
            if any(e.name not in FLOORS for e in timing):
                crash = self._spawn("oracle", [], truth)
                if isinstance(crash, str):
                    print(f"{self.case.name}: no float64 oracle ({crash}): left for another run")
                    return
            else:
                truth = None
            # The floors and what bars are about by themselves: beside slower methods they would get few rounds.
            together = [[e for e in timing if not e.alone and (e.level == CORE) is core] for core in (True, False)]
            for group in [*filter(None, together), *([e] for e in timing if e.alone)]:
                self._time(group, truth)
        for e in self.entries:
            if self._missing(e, "memory"):
                self._record("memory", [e], self._spawn("memory", [e], None))

    def _time(self, group: list[Entry], truth: str | None) -> None:
        results = self._spawn("timing", group, truth)
        if isinstance(results, str) and len(group) > 1:  # the process died: find out whose fault it was
            for e in group:
                self._time([e], truth)
        else:
            self._record("timing", group, results)

    def _path(self, e: Entry) -> Path:
        return self.args.out / self.case.name / f"{e.name}.json"

    def _missing(self, e: Entry, part: str) -> bool:
        if not self._path(e).exists():
            return True
        found = read_json(self._path(e), kind=KIND, schema=SCHEMA).get(part)
        return found is None or (self.args.retry and bool(found.keys() & {"failed", "skipped"}))

    def _record(self, part: str, group: list[Entry], results: dict[str, Any] | str) -> None:
        for e in group:
            path = self._path(e)
            old = read_json(path, kind=KIND, schema=SCHEMA) if path.exists() else {}
            found: dict[str, Any] = {"failed": results} if isinstance(results, str) else results[e.name]
            record = {**old, **self.facts, "method": e.name, "label": e.label, "note": e.note, **_package(e)}
            if "accuracy" in found:
                record["accuracy"] = found.pop("accuracy")
            record[part] = {**found.pop(part, {}), **found, "date": self.facts["provenance"]["date"]}
            write_json(path, record)

    def _spawn(self, part: str, entries: list[Entry], truth: str | None) -> dict[str, Any] | str:
        """What the process found, or why there is nothing."""
        names = [e.name for e in entries]
        print(f"{self.case.name}: {part} {' '.join(names)}", end=" ", flush=True)
        begun = time.perf_counter()
        job = {
            "part": part,
            "case": dataclasses.asdict(self.case),
            "methods": names,
            "environment": {k: v for e in entries for k, v in e.environment.items()},
            "oracle": truth,
            "folder": self.args.model,
            "rounds": self.args.rounds,
            "seconds": self.args.seconds / (3 if any(e.alone for e in entries) else 1),
            "threads": self.args.threads,
        }
        with tempfile.TemporaryDirectory() as folder:
            out, log = Path(folder) / "out.json", Path(folder) / "log"
            process = _PROCESSES.Process(target=work, args=(job, out, log))
            process.start()
            process.join(self.args.timeout)
            if process.exitcode is None:
                process.kill()
                process.join()
                results: dict[str, Any] | str = f"took longer than {self.args.timeout:g} s"
            elif out.exists():
                results = json.loads(out.read_text())
            else:
                last = log.read_text().strip().splitlines()[-1:] if log.exists() else []
                results = f"ended with {process.exitcode}: {' '.join(last)[:200] or 'no message'}"
        took = time.perf_counter() - begun
        print(f"({took:.0f} s)", results if isinstance(results, str) else _short(results), flush=True)
        return results


def _short(results: dict[str, Any]) -> str:
    words = []
    for name, r in results.items():
        problem = r.get("failed") or r.get("skipped")
        ratio = (r.get("timing", {}).get("ratio_to_floor_a") or {}).get("median")
        peak = r.get("memory", {}).get("peak_mib")
        if problem or ratio or peak:
            words.append(f"{name}: {problem or (f'{ratio:.2f}' if ratio else f'{peak:.0f} MiB')}")
    return "; ".join(words)


def _package(e: Entry) -> dict[str, str]:
    try:
        return {"package": f"{e.package} {metadata.version(e.package)}"} if e.package else {}
    except metadata.PackageNotFoundError:
        return {}


def _revision() -> str | None:
    try:
        command = ["git", "describe", "--always", "--dirty"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def hardware() -> dict[str, Any]:
    """Processor, cores, memory, and the instructions that matter here."""
    facts: dict[str, Any] = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(row.split(":", 1) for row in info.read_text().splitlines() if ":" in row)
        fields = {k.strip(): v.strip() for k, v in fields.items()}
        flags = sorted(f for f in fields.get("flags", "").split() if f.startswith(("avx", "amx", "fma")))
        facts.update(cpu=fields.get("model name", facts["cpu"]), flags=flags)
    memory = Path("/proc/meminfo")
    if memory.exists():
        facts["memory_gib"] = round(int(memory.read_text().split()[1]) / 2**20, 1)
    return facts


if __name__ == "__main__":
    main()
