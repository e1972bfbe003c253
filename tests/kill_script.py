"""Starts the command line again and again and kills it, for test_checkpoint.py; prints what became of all as JSON.

Each run is a fork of this process, which has imported everything, has computed nothing and so has no threads.
"""

import contextlib
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import tiny  # noqa: F401 (the model's code)

from guided_dropout import fisher, models  # noqa: F401 (what the command line imports when it is called)
from guided_dropout.cli import app as cli

LINE = (
    "fisher model --text text.txt --samples 240 --max-length 12 --batch-size 2 --seed 1 --checkpoint-every 0 "
    "--resume --device cpu --out"
)
KILLS, PATIENCE = 4, 200.0


def start(out: str) -> int:
    """The command line in a process of its own, with its output in `out`.log."""
    if pid := os.fork():
        return pid
    code: object = 1
    try:
        log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = ["guided-dropout", *LINE.split(), out]
        cli.main()
    except SystemExit as e:
        code = e.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def ended(pid: int, seconds: float) -> int | None:
    """The exit code of a process, minus the signal if it was killed; None if it still runs after so long."""
    end = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            return None
        time.sleep(0.001)


def written(folder: Path) -> list[tuple[int, int]]:
    """Tells one state on disk from the next."""
    with contextlib.suppress(FileNotFoundError):  # removed at the end
        return [(f.stat().st_ino, f.stat().st_mtime_ns) for f in folder.glob("process-*")]
    return []


def after_states(folder: Path, pid: int, number: int) -> int | None:
    """Wait until so many states were seen; the exit code if the process ended before."""
    before, end = written(folder), time.monotonic() + PATIENCE
    while number and time.monotonic() < end:
        if (code := ended(pid, 0)) is not None:
            return code
        if (now := written(folder)) != before:
            before, number = now, number - 1
        time.sleep(0.001)
    return None


def main() -> None:
    """One run that is left alone, and one that is killed, in the folder that is the argument."""
    os.chdir(sys.argv[1])
    whole, codes, rng = start("whole"), [], random.Random(0)
    while True:
        pid = start("killed")
        if len(codes) < KILLS:
            code = after_states(Path("killed.checkpoint"), pid, rng.randint(1, 10) if codes else 0)
            code = ended(pid, rng.uniform(0, 0.01)) if code is None else code
        else:
            code = ended(pid, PATIENCE)
        if code is not None:
            codes.append(code)
            break
        os.kill(pid, signal.SIGKILL)
        codes.append(ended(pid, PATIENCE))
        if len(codes) > KILLS:
            break
    code = ended(whole, PATIENCE)
    if code is None:
        os.kill(whole, signal.SIGKILL)
    print(json.dumps({"whole": code, "killed": codes}))


if __name__ == "__main__":
    main()
