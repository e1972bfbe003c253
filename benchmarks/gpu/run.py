"""Everything that waits for a GPU, in one command that can be stopped and started again.

python benchmarks/gpu/run.py                 # all pieces, in under nine minutes on an H100 or A100
python benchmarks/gpu/run.py --only roofline
python benchmarks/gpu/run.py --quick --out build/gpu   # tiny sizes, on a CPU: shows that the script works

Each piece is one JSON file in OUT/DEVICE; one that is there and right is not run again. Where the kernel is wrong,
nothing else is run. docs/gpu.md says what they are for.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TESTS = ("tests/test_gpu.py", "tests/test_triton_kernel.py")
TESTS_SECONDS = 300  # of which they take a few; one that hangs would take all the time there is


def main() -> None:
    """Run the pieces that are missing, as far as the time goes; exit with 1 if one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/gpu")
    parser.add_argument("--only", nargs="+", metavar="PIECE")
    parser.add_argument("--again", action="store_true", help="run pieces whose result is there already, too")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, on a CPU where there is no GPU")
    parser.add_argument("--minutes", type=float, default=8.0, help="begin no piece after so many")
    options = parser.parse_args()
    start = time.monotonic()
    import torch

    if not torch.cuda.is_available():
        if not options.quick:
            parser.error("no GPU found; expected one (or --quick, which shows on a CPU that the script works)")
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pieces = _pieces(device, quick=options.quick)
    for name in options.only or ():
        if name not in pieces:
            parser.error(f"no piece {name}; expected some of {', '.join(pieces)}")
    from measure import folder_name, free, machine

    from guided_dropout.artefacts import write_json

    folder, wrong = options.out / folder_name(device), []
    for name in options.only or pieces:
        path = folder / f"{name}.json"
        stored = json.loads(path.read_text())["result"] if path.exists() else None
        if stored is not None and _is_right(stored) and not options.again:
            print(f"{name}: there already", flush=True)
            continue
        if time.monotonic() - start > 60 * options.minutes:
            print(f"{name}: no time left; start the same command again", flush=True)
            if stored is not None and not _is_right(stored):
                wrong.append(name)
            continue
        begun = time.monotonic()
        try:
            result = pieces[name]()
        except Exception as e:  # whatever it is, the other pieces can be run
            result = {"ok": False, "failed": f"{type(e).__name__}: {e}"}
        facts = {"kind": "gpu-benchmark", "schema": 1, "piece": name, "quick": options.quick}
        seconds = time.monotonic() - begun
        write_json(path, {**facts, "seconds": seconds, "machine": machine(device), "result": result})
        print(f"{name}: {_summary(result)} ({seconds:.0f} s) {path}", flush=True)
        free()
        if not _is_right(result):
            wrong.append(name)
            if name == "correctness":
                print("the kernel is wrong on this device: nothing else was run", flush=True)
                break
    if wrong:
        sys.exit(f"wrong: {', '.join(wrong)}")


def _pieces(device: Any, *, quick: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    import kernel
    import models

    rounds = 2 if quick else 7
    return {
        "correctness": partial(kernel.correctness, device, quick=quick),
        **({} if quick else {"library": _library}),
        "roofline": partial(kernel.roofline, device, quick=quick),
        **{
            name: partial(models.fisher, device, case, rounds=rounds)
            for name, case in models.cases(quick=quick).items()
        },
    }


def _library() -> dict[str, Any]:
    """The library's tests with models on the GPU, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not real", *TESTS]
    try:
        run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=TESTS_SECONDS)
        found, output = {"ok": run.returncode == 0}, run.stdout
    except subprocess.TimeoutExpired as e:
        found, output = {"ok": False, "failed": f"the tests had not ended after {TESTS_SECONDS} s"}, e.output or b""
    return {**found, "tests": list(TESTS), "output": output.decode(errors="replace")[-4000:].splitlines()}


def _is_right(result: dict[str, Any]) -> bool:
    return result.get("ok", True) and "failed" not in result


def _summary(result: dict[str, Any]) -> str:
    if "failed" in result:
        return result["failed"]
    over = result.get("fisher_over")
    if over is not None:
        return ", ".join(f"{ratio:.2f} of {way}" for way, ratio in over.items()) or "no ratio"
    return {True: "right", False: "WRONG", None: "done"}[result.get("ok")]


if __name__ == "__main__":
    main()
