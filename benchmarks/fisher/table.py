"""The methods by name; one that this version lacks, or whose library is missing, is recorded as skipped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

import torch

from benchmarks.fisher import methods, peers
from benchmarks.fisher.cases import ALL, CORE, MAIN, MORE, Case


@dataclass(frozen=True)
class Entry:
    """A row of the table.

    Attributes:
        name: in file names and on the command line.
        label: in the summary.
        make: the method.
        level: cases of this level and above are measured with it.
        alone: timed in a process of its own beside the floors, because it wraps much or holds much.
        package: the library's name on PyPI.
        note: what a reader has to know.
        environment: variables of its process.
    """

    name: str
    label: str
    make: type[methods.Method]
    level: int = CORE
    alone: bool = False
    package: str | None = None
    note: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


def _with(make: type[methods.Method], **attributes: Any) -> type[methods.Method]:
    return type(make.__name__, (make,), {"__doc__": make.__doc__, **attributes})


_BATCHED, _ESTIMATE = methods.Batched, methods.Estimate
_SCORES = {"scores_only": True}
_BF16 = torch.bfloat16
_WHOLE = "one call over four batches: plan, its check and the profile included"
_LAST_USE = "covers linear layers and embeddings; of a tied table the last use only"
FLOORS = ("floor-a", "floor-b")
YARDSTICKS = (*FLOORS, "batched")  # timed beside every method

ENTRIES = (
    Entry("floor-a", "floor A: plain forward + backward", methods.PlainBackward),
    Entry("floor-b", "floor B: head at targets only", methods.TargetBackward),
    Entry("batched", "**guided-dropout**, warm", _BATCHED),
    Entry("batched-scores", "**guided-dropout**, warm, scores only", _with(_BATCHED, options=_SCORES)),
    Entry("batched-bf16", "**guided-dropout**, warm, bfloat16", _with(_BATCHED, dtype=_BF16), ALL),
    Entry("batched-scores-bf16", "**guided-dropout**, warm, scores, bfloat16",
          _with(_BATCHED, options=_SCORES, dtype=_BF16), ALL),
    Entry("batched-portable", "**guided-dropout**, warm, without AMX", _BATCHED, MORE, alone=True,
          environment={"GUIDED_DROPOUT_KERNEL": "portable"}),
    Entry("batched-torch", "**guided-dropout**, warm, no C compiler", _BATCHED, MORE, alone=True,
          environment={"GUIDED_DROPOUT_KERNEL": "off"}),
    Entry("estimate", "**guided-dropout**, `estimate_fisher`", _ESTIMATE, MAIN, alone=True, note=_WHOLE),
    Entry("estimate-scores", "**guided-dropout**, `estimate_fisher`, scores only", _with(_ESTIMATE, options=_SCORES),
          MORE, alone=True, note=_WHOLE),
    Entry("loop", "one sample at a time", methods.Loop, MAIN),
    Entry("published", "the paper's scripts' way", methods.Published, MORE, alone=True,
          note="a chunk is the batch here, not 100 samples: the same work per sample, a fraction of the memory"),
    Entry("published-96", "the paper's scripts' way, 96 at a time", methods.PublishedInHundreds, MORE, alone=True,
          note="the scripts' chunk of 100, in whole batches of 8: fresh memory, of which each page has to be made"),
    Entry("published-512", "the paper's scripts' way, padded to 512", methods.PublishedPadded, ALL, alone=True,
          note="the scripts pad every sample to 512 tokens"),
    Entry("vmap", "`torch.func.vmap(grad)`", methods.Vmap, MORE),
    Entry("vmap-in-twos", "`torch.func.vmap(grad)`, chunks of 2", methods.VmapInTwos, MAIN),
    Entry("opacus", "Opacus", peers.Opacus, MAIN, alone=True, package="opacus"),
    Entry("kronfluence", "Kronfluence, diagonal", peers.Kronfluence, ALL, alone=True, package="kronfluence",
          note="covers linear layers only; a tied table without its look-ups"),
    Entry("asdl", "ASDL, diagonal", peers.Asdl, ALL, alone=True, package="asdfghjkl",
          note="squares per token, not per sample"),
    Entry("backpack", "BackPACK, SumGradSquared", peers.BackPack, ALL, alone=True, package="backpack-for-pytorch",
          note=_LAST_USE),
    Entry("backpack-batchgrad", "BackPACK, BatchGrad", peers.BackPackBatchGrad, ALL, alone=True,
          package="backpack-for-pytorch", note=_LAST_USE),
)  # fmt: skip


def find_entries(case: Case, patterns: list[str] | None = None) -> list[Entry]:
    """What `case` is measured with: by its level, or whatever matches one of the shell patterns."""
    if patterns is None:
        return [e for e in ENTRIES if e.level <= case.level]
    return [e for e in ENTRIES if any(fnmatch(e.name, p) for p in patterns)]


def entry(name: str) -> Entry:
    """The entry of that name."""
    (found,) = (e for e in ENTRIES if e.name == name)
    return found
