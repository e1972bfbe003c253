"""Training steps of copies of one classifier that differ in their dropout rates alone, taken in turn."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from guided_dropout import DropoutSchedule, apply_dropout, corpus, estimate_fisher
from guided_dropout.demo.text import demo_paragraphs
from guided_dropout.models import load_classifier, load_lm, load_tokenizer

UPPER = 0.1
FLOOR = 0.001
COPIES = {
    "dropout": f"plain dropout, {UPPER:g} at each site: what the others are compared with",
    "again": "plain dropout once more: how far two equal things differ",
    "guided": "the schedule",
    "guided-above-0": f"the schedule with {FLOOR:g} in the place of 0, as a rate of 0 may be compiled away",
}
CYCLE = len(list(itertools.permutations(COPIES)))
"""After so many rounds each copy has stood in each place as often as the others, and after each of them."""
_WARMUP = 5


@dataclass(frozen=True)
class Setting:
    """What is timed.

    Attributes:
        model: ``"demo"``, a folder or a hub name.
        mode: ``"eager"`` or ``"compiled"``.
        device: ``"cpu"`` or ``"cuda"``.
        batch_size: texts a step.
        length: tokens a text.
    """

    model: str
    mode: str
    device: str
    batch_size: int
    length: int


def schedule_for(model: str, file: Path | None) -> DropoutSchedule:
    """The schedule in `file`, or one from a quick profile on the embedded text."""
    if file:
        return DropoutSchedule.load(file)
    lm, tokenizer = load_lm(model), load_tokenizer(model)
    samples = corpus.lm_samples(demo_paragraphs(), tokenizer, objective="mlm", num_samples=32, max_length=64)
    return DropoutSchedule.from_profile(estimate_fisher(lm, samples), lm, upper=UPPER)


def rates_of(schedule: DropoutSchedule, model: nn.Module) -> dict[str, DropoutSchedule]:
    """Copy → its rates on `model`."""
    plain = DropoutSchedule.uniform(model, UPPER)
    above = replace(schedule, rates={path: rate or FLOOR for path, rate in schedule.rates.items()})
    return {"dropout": plain, "again": plain, "guided": schedule, "guided-above-0": above}


def rounds(setting: Setting, schedule: DropoutSchedule) -> Iterator[dict[str, float]]:
    """Seconds of one step of each copy, round after round without end.

    A step is forward, backward and AdamW on the same batch. The order of the copies goes through all permutations, so
    that what else the machine does meets all of them alike.
    """
    device = torch.device(setting.device)
    base = load_classifier(setting.model, 2, head_seed=0).to(device).train()  # pyright: ignore[reportArgumentType]
    shape = (setting.batch_size, setting.length)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, base.config.vocab_size, shape, generator=generator).to(device)
    labels = torch.arange(setting.batch_size, device=device) % 2
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    with ExitStack() as stack:
        steps: dict[str, Callable[[], float]] = {}
        for name, rates in rates_of(schedule, base).items():
            model = copy.deepcopy(base)
            stack.enter_context(apply_dropout(model, rates))
            steps[name] = _stepper(model, batch, compiled=setting.mode == "compiled")
            for _ in range(_WARMUP):
                steps[name]()
        for order in itertools.cycle(itertools.permutations(COPIES)):
            yield {name: steps[name]() for name in order}


def _stepper(model: PreTrainedModel, batch: Mapping[str, torch.Tensor], *, compiled: bool) -> Callable[[], float]:
    """A function that takes one training step and returns its seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, fused=True)
    # By default the second set of rates would be compiled as inputs of the graph, the first as numbers in it.
    run = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
    device = batch["input_ids"].device

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def step() -> float:
        wait()
        start = time.perf_counter()
        run(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wait()
        return time.perf_counter() - start

    return step
