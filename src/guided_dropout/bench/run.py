"""Runs an experiment: what is missing, in several processes, whatever happens to one of them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from typing import Any

import torch

from guided_dropout.bench.folder import Experiment, Failure, Run, shared_facts
from guided_dropout.bench.grid import RunKey
from guided_dropout.bench.plan import Plan, Runner
from guided_dropout.errors import ArtefactError

_ELSEWHERE, _REFUSED = "elsewhere", "refused"


@dataclass(frozen=True)
class Done:
    """A run that has ended.

    Attributes:
        key: which.
        status: as `Run.status`; ``"elsewhere"`` where another process has it or had it.
        value: the main metric, if there is one.
        seconds: how long it took here.
    """

    key: RunKey
    status: str
    value: float | None
    seconds: float


def run_experiment(
    plan: Plan,
    experiment: Experiment,
    keys: Sequence[RunKey],
    *,
    jobs: int = 1,
    threads: int | None = None,
    told: Callable[[Done], None] = lambda done: None,
) -> None:
    """Make the runs of `keys`, each written when it is done.

    A run that raises is written as a failure, and so is one whose result no file can hold, or whose process dies; the
    rest goes on. Runs that another invocation is making, or has made since, are left to it. Without a GPU the processes
    of later calls see the environment variables of the first.

    Args:
        plan: what they are made with.
        experiment: where they are written.
        keys: which, in order.
        jobs: processes; each keeps a model of its own.
        threads: of torch, in each process; by default the processors shared out, or ``OMP_NUM_THREADS`` if less.
        told: called after each run.

    Raises:
        ArtefactError: a run was made in another way than those that it would stand beside, or cannot be written.
    """
    jobs = max(1, min(jobs, len(keys)))
    threads = threads or max(1, min(processors() // jobs, _threads_asked_for()))
    waiting = deque(keys)
    workers: list[_Worker] = []
    try:
        while waiting or any(w.key for w in workers):
            while waiting and len(workers) < jobs:
                workers.append(_Worker(plan, experiment, threads))
            for w in workers:
                if w.key is None and waiting:
                    w.begin(waiting.popleft())
            busy = {w.channel: w for w in workers if w.key}
            for ready in wait(list(busy)):
                w = busy[ready]  # pyright: ignore[reportArgumentType]
                done = w.end()
                if done is None:
                    workers.remove(w)
                    done = w.died(experiment)
                told(done)
    finally:
        for w in workers:
            w.stop()
        experiment.remove_claims()


def check_joining(plan: Plan, experiment: Experiment, keys: Iterable[RunKey]) -> None:
    """Make sure, before any is made, that these runs can be reported with those that are there.

    Raises:
        ArtefactError: they cannot; both sides are shown.
        GuidedDropoutError: a model or data cannot be loaded.
    """
    runner = Runner(plan)
    there = {_cell(run.key) for run in experiment.whole_runs() if run.result}
    for key in {_cell(key): key for key in keys if _cell(key) in there}.values():
        experiment.check_alike(key, runner.foretell(key))


def _cell(key: RunKey) -> tuple[str, str, float]:
    return key.model, key.task, key.fraction


def _threads_asked_for() -> int:
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) else sys.maxsize


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processes() -> BaseContext:
    """How workers are started: from a server that has imported everything once, where a GPU does not forbid it."""
    # What is forked cannot use a GPU that anything has looked at before, be it while it was imported.
    if not sys.platform.startswith("linux") or torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    # While it imports, which takes seconds, it would answer the terminal's Ctrl-C, sent to all, with a traceback.
    with _ignored(signal.SIGINT):
        forkserver.ensure_running()
    return context


@contextlib.contextmanager
def _ignored(number: signal.Signals) -> Iterator[None]:
    """Within, processes are started that ignore a signal from their first moment on."""
    if threading.current_thread() is not threading.main_thread():  # which alone may say what becomes of signals
        yield
        return
    before = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, before)


class _Worker:
    """A process that makes one run after the other."""

    def __init__(self, plan: Plan, experiment: Experiment, threads: int):
        context: Any = _processes()
        self.channel, theirs = context.Pipe()
        self.key: RunKey | None = None
        self.begun = 0.0
        arguments = (theirs, plan, str(experiment.path), threads)
        self.process = context.Process(target=_work, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def begin(self, key: RunKey) -> None:
        self.key, self.begun = key, time.perf_counter()
        with contextlib.suppress(OSError):  # it has died: `end` will see
            self.channel.send(key)

    def end(self) -> Done | None:
        """What became of its run; None if the process died.

        Raises:
            ArtefactError: it must not be written, or cannot.
        """
        assert self.key is not None
        try:
            status, value = self.channel.recv()
        except (EOFError, OSError):
            return None
        if status == _REFUSED:
            raise ArtefactError(value)
        done = Done(self.key, status, value, time.perf_counter() - self.begun)
        self.key = None
        return done

    def died(self, experiment: Experiment) -> Done:
        """Write that the process died in its run, unless the run was written before, or is another's by now."""
        assert self.key is not None
        seconds = time.perf_counter() - self.begun
        self.process.join(10)
        code = self.process.exitcode
        how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        why = "often for want of memory: try fewer jobs or smaller batches"
        if how != "SIGKILL":
            why = "what it printed before, if anything, says more: look there, or make this run alone, --jobs 1"
        message = f"the process of the run died ({how}); {why}"
        with experiment.claim(self.key) as mine:
            if experiment.is_done(self.key):
                run = experiment.read(experiment.file(self.key))
                return Done(self.key, run.status, run.result and run.result.value, seconds)
            if not mine:
                return Done(self.key, _ELSEWHERE, None, seconds)
            experiment.write(Run(self.key, failure=Failure("ProcessDied", message, "")))
        return Done(self.key, "failed", None, seconds)

    def stop(self) -> None:
        self.channel.close()
        if self.key is None:
            self.process.join(5)
        self.process.terminate()


def _work(channel: Connection, plan: Plan, folder: str, threads: int) -> None:
    """The life of a process: runs until its channel closes, as it does when the parent is gone, however that went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; the parent decides
    torch.set_num_threads(threads)
    experiment, runner = Experiment(folder), Runner(plan)
    while True:
        try:
            key = channel.recv()
        except (EOFError, OSError):
            return
        answer = _make(experiment, runner, key)
        try:
            channel.send(answer)
        except OSError:
            return


def _make(experiment: Experiment, runner: Runner, key: RunKey) -> tuple[str, Any]:
    with experiment.claim(key) as mine:
        if not mine or experiment.is_done(key):
            return _ELSEWHERE, None
        try:
            run = Run(key, result=runner.run(key))
        except Exception as error:
            run = Run(key, failure=Failure.of(error))
        try:
            run = _write(experiment, run)
        except ArtefactError as error:
            return _REFUSED, str(error)
    return run.status, run.result and run.result.value


def _write(experiment: Experiment, run: Run) -> Run:
    """Write a run, and return what was written: a failure where no file can hold its result (NaN, other objects).

    Raises:
        ArtefactError: it must not be written, or cannot.
    """
    try:
        if run.result:  # of what `check_joining` could not foresee, such as another machine's runs since then
            experiment.check_alike(run.key, shared_facts(run.result))
        experiment.write(run)
    except ArtefactError:
        raise
    except Exception as error:
        run = Run(run.key, failure=Failure.of(error))
        experiment.write(run)
    return run
