"""Several processes that share one estimate out: who does what, one outcome for all, sums over all.

Processes are started by ``accelerate launch --multi_gpu`` or ``torchrun``, with or without GPUs. They meet after every
few batches, so that an error in one, or a lost one, ends all of them at once and nobody waits for ever.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from guided_dropout.errors import GuidedDropoutError, ModelError
from guided_dropout.unfinished import differences

if TYPE_CHECKING:
    from accelerate import PartialState

# Batches between two meetings: enough for their lengths to even out, few enough for an error to be told soon.
BATCHES_BETWEEN = 8
# Where launchers say how many processes there are; accelerate, and so the Trainer, goes by any of them.
_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


class ProcessError(GuidedDropoutError):
    """Another process failed; its message is this one's."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them.

    Attributes:
        index: this one's number, from 0, which is the main one.
        count: how many there are.
        device: where this one computes, and where sums over all are made; None for a single process.
    """

    index: int = 0
    count: int = 1
    device: torch.device | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.index == 0

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What is done within has failed in all processes if it failed in any; all wait for the last.

        Raises:
            ProcessError: it failed in another process.
        """
        error: BaseException | None = None
        try:
            yield
        except BaseException as e:
            error = e
        self._meet(error)

    def exchange(self, work: Callable[[], Any]) -> list[Any]:
        """What `work` gives in each process, in order, in each of them.

        Raises:
            ProcessError: it failed in another process.
        """
        error, value = None, None
        try:
            value = work()
        except BaseException as e:
            error = e
        return self._meet(error, value)

    def in_step(self, steps: Iterable[Any]) -> None:
        """Go through `steps` to the end, and return when all processes have.

        Raises:
            ProcessError: another process failed.
        """
        if self.count == 1:
            for _ in steps:
                pass
            return
        steps, finished = iter(steps), [False]
        while not all(finished):
            finished = self.exchange(lambda: sum(1 for _ in itertools.islice(steps, BATCHES_BETWEEN)) < BATCHES_BETWEEN)

    def gather(self, value: Any) -> list[Any]:
        """Each process's `value`, in order, in each process."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        with _told_if_lost():
            dist.all_gather_object(values, value)
        return values

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Make sure that all processes work on the same.

        Raises:
            ModelError: one works on something else; what differs is told from both sides.
        """
        main, *others = self.gather(dict(facts))
        for index, other in enumerate(others, start=1):
            odd = differences(main, other)
            if odd:
                raise ModelError(
                    f"process {index} works on something else than process 0: {odd}; expected the same in all"
                )

    def sum(self, value: Tensor) -> Tensor:
        """The sum of `value` over the processes, in each of them, where it was."""
        if self.count == 1:
            return value
        shared = value.to(self.device, copy=True)
        with _told_if_lost():
            dist.all_reduce(shared)
        return shared.to(value.device)

    def _meet(self, error: BaseException | None, value: Any = None) -> list[Any]:
        message = None
        if error is not None:
            message = (
                str(error) if isinstance(error, GuidedDropoutError) else f"{type(error).__name__} {error}".rstrip()
            )
        try:
            outcomes = self.gather((message, value))
        except GuidedDropoutError:
            if error is None:
                raise
            raise error from None  # this one's own is the better news
        if error is None:
            failed = [
                f"process {i} of {self.count}: {told}" for i, (told, _) in enumerate(outcomes) if told is not None
            ]
            error = ProcessError(failed[0]) if failed else None
        if error is not None:
            if isinstance(error, GuidedDropoutError):
                error.told_elsewhere = not self.is_main
            raise error
        return [value for _, value in outcomes]


def current_processes() -> Processes:
    """The processes that a launcher started, of which this is one; joins them on the first call.

    On CUDA they exchange sums through the GPUs (NCCL) and all else through the CPUs (gloo): there one that waits for a
    lost process is told, and a signal reaches it.

    Raises:
        ProcessError: the launcher was asked for several and started one, or started more than there are GPUs.
    """
    environment = os.environ
    if not dist.is_initialized() and int(environment.get("WORLD_SIZE", "1")) == 1:
        # What `accelerate launch --cpu --num_processes 2` leaves, which means it for MPI and starts a single process.
        if "MASTER_PORT" in environment and "WORLD_SIZE" not in environment and "ACCELERATE_USE_CPU" in environment:
            raise ProcessError(
                "accelerate launch --cpu started one process of several; expected all of them: use `torchrun "
                "--nproc_per_node N -m guided_dropout …` or `accelerate launch --multi_gpu`, both of which also run "
                "without a GPU"
            )
        return Processes()
    if not dist.is_initialized() and torch.cuda.is_available():
        _check_gpus(int(environment.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count())
    state = _state()
    device = state.device
    if device is None:
        raise AssertionError("a process of several has a device")
    return Processes(state.process_index, state.num_processes, torch.device("cpu") if device.type == "cpu" else device)


def check_alone() -> None:
    """Refuse to be one of several processes: the Trainer would share a single training out to all of them.

    Raises:
        ProcessError: a launcher started several, or they have joined already.
    """
    told = {name: os.environ.get(name, "") for name in _COUNTS}
    if dist.is_initialized():
        told["torch.distributed"] = str(dist.get_world_size())
    for name, count in told.items():
        if count.isdigit() and int(count) > 1:
            error = ProcessError(
                f"found {count} processes ({name}); expected one, since a run is trained in a single process: start "
                "it without torchrun or accelerate launch (`bench run --jobs` makes several runs side by side)"
            )
            error.told_elsewhere = os.environ.get("RANK", "0") != "0"
            raise error


def _check_gpus(processes: int, gpus: int) -> None:
    """Refuse two processes on one GPU, which NCCL ends later, as if one had been lost."""
    if processes > gpus:
        error = ProcessError(
            f"{processes} processes were started where there are {gpus} GPUs; expected one GPU for each: start at most "
            f"{gpus}, or hide the GPUs (CUDA_VISIBLE_DEVICES=) to run on the CPU"
        )
        error.told_elsewhere = os.environ.get("LOCAL_RANK", "0") != "0"
        raise error


def _state() -> PartialState:
    from accelerate import PartialState

    if not torch.accelerator.is_available():
        return PartialState(cpu=True)
    if torch.cuda.is_available():
        try:
            return PartialState(backend="cuda:nccl,cpu:gloo")
        except ValueError:  # an accelerate that takes NCCL alone, refused before anything was joined
            PartialState._reset_state()
    return PartialState()


def leave_processes() -> None:
    """Close the connections to the other processes, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def _told_if_lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as e:
        reason = str(e).splitlines()[0]
        raise ProcessError(
            f"lost another process ({reason}); expected all to run to the end: look for its own error"
        ) from e
