"""The floors, this project, and what can be written with torch alone. Other libraries are in `peers`."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from transformers import PreTrainedModel

from benchmarks.fisher.cases import Sample
from guided_dropout import estimate_fisher
from guided_dropout.fisher.check import checked_plan
from guided_dropout.fisher.fast import BatchedSquares
from guided_dropout.fisher.kernels import backend
from guided_dropout.objectives import IGNORE, Batch, Objective


class UnavailableError(Exception):
    """A method cannot be measured here; the message says why."""


class Method(ABC):
    """One way to get the Fisher of a model.

    Args:
        model: the method's own copy; it may wrap and change it.
        objective: the loss.
        samples: a batch like those to come, for whatever a method prepares once.
    """

    repeats = 1  # how often a step goes through its batch
    imports: tuple[str, ...] = ()  # what has to be imported before memory is measured

    def __init__(self, model: PreTrainedModel, objective: Objective, samples: Sequence[Sample]):
        self.model, self.objective = model, objective
        self.names = {id(p): n for n, p in model.named_parameters()}  # wrapping changes names, not parameters
        self.sums: dict[str, Tensor] = {}
        self.seen = 0
        self.prepare(samples)

    def prepare(self, samples: Sequence[Sample]) -> None:  # noqa: B027 (most have nothing to prepare)
        """What is done once, before the batches."""

    @abstractmethod
    def step(self, samples: Sequence[Sample]) -> None:
        """One batch."""

    def fisher(self) -> Mapping[str, Tensor] | None:
        """Name → mean of the squares over the samples so far, or their sum over the elements; None for a floor."""
        return {n: t / self.seen for n, t in self.sums.items()}

    def facts(self) -> dict[str, Any]:
        """What a reader of the timing has to know."""
        return {}

    def add(self, parameter: Tensor, squares: Tensor) -> None:
        """Add the sum of squares of some samples to a parameter's."""
        name = self.names[id(parameter)]
        if name in self.sums:
            self.sums[name] += squares
        else:
            self.sums[name] = squares

    def losses(self, batch: Batch, **inputs: Tensor) -> Tensor:
        """The losses of a batch [B] from the full logits."""
        return sample_losses(self.model(**batch.inputs, **inputs).logits, batch)


def sample_losses(logits: Tensor, batch: Batch) -> Tensor:
    """Logits [B, T, V] → each sample's mean cross-entropy over its targets [B]."""
    ce = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE, reduction="none")
    return (ce.view_as(batch.targets) * batch.weights.to(ce.dtype)).sum(1)


class PlainBackward(Method):
    """Floor A: one training step's forward and backward, as transformers computes the loss."""

    def step(self, samples: Sequence[Sample]) -> None:
        """Forward and backward with labels."""
        batch = self.objective.collate(self.model, samples)
        labels = nn.utils.rnn.pad_sequence([s["labels"] for s in samples], batch_first=True, padding_value=IGNORE)
        self.model(**batch.inputs, labels=labels).loss.backward()
        self.model.zero_grad(set_to_none=True)

    def fisher(self) -> None:
        """A floor has none."""


class TargetBackward(Method):
    """Floor B: the same with everything above the hidden states run at target positions only."""

    def step(self, samples: Sequence[Sample]) -> None:
        """Forward, head at the targets, backward."""
        batch = self.objective.collate(self.model, samples)
        at = batch.targets != IGNORE

        def select(_: nn.Module, args: Any, output: Any) -> Any:
            output.last_hidden_state = output.last_hidden_state[at][None]
            return output

        handle = self.model.base_model.register_forward_hook(select)
        try:
            logits = self.model(**batch.inputs).logits[0]
        finally:
            handle.remove()
        F.cross_entropy(logits, batch.targets[at]).backward()
        self.model.zero_grad(set_to_none=True)

    def fisher(self) -> None:
        """A floor has none."""


class Batched(Method):
    """This project, batch after batch; the plan is made in `prepare`."""

    options: Mapping[str, Any] = {}
    dtype = torch.float32

    def prepare(self, samples: Sequence[Sample]) -> None:
        """Find what is per sample, and check it."""
        _require(BatchedSquares, self.options)
        self.model.requires_grad_(False).to(self.dtype)  # pyright: ignore[reportArgumentType]
        parameters = dict(self.model.named_parameters())
        plan = checked_plan(self.model, self.objective, parameters, samples)
        self.squares = BatchedSquares(self.model, self.objective, parameters, plan, **self.options)

    def step(self, samples: Sequence[Sample]) -> None:
        """Add a batch."""
        self.squares.add(samples)
        self.seen += len(samples)

    def fisher(self) -> Mapping[str, Tensor]:
        """Of each parameter, or its sum (scores only)."""
        return {n: self.squares.totals.total(n) / self.seen for n in self.squares.parameters}

    def facts(self) -> dict[str, Any]:
        """The kernel, and the parameters that took the loop."""
        return {"kernel": backend(self.model.device, self.dtype), "fallback": sorted(self.squares.fallback)}


class Estimate(Method):
    """This project's public function as called by a user: samples in, profile out, plan included."""

    repeats = 4
    options: Mapping[str, Any] = {}

    def prepare(self, samples: Sequence[Sample]) -> None:
        """Nothing to prepare."""
        _require(estimate_fisher, self.options)

    def step(self, samples: Sequence[Sample]) -> None:
        """A whole run over four such batches."""
        stream = list(samples) * self.repeats
        self.profile = estimate_fisher(self.model, stream, batch_size=len(samples), **self.options)

    def fisher(self) -> Mapping[str, Tensor]:
        """Of each parameter, or its sum (scores only)."""
        if self.profile.diagonal:
            return self.profile.diagonal
        sizes = {n: p.numel() for n, p in self.model.named_parameters()}
        return {n: torch.tensor(m * sizes[n]) for n, m in self.profile.tensor_means.items()}

    def facts(self) -> dict[str, Any]:
        """The parameters that took the loop."""
        return {"fallback": self.profile.coverage["fallback"]}


def _require(function: Any, options: Mapping[str, Any]) -> None:
    missing = [o for o in options if o not in inspect.signature(function).parameters]
    if missing:
        raise UnavailableError(f"this version's {function.__name__} has no option {', '.join(missing)}")


class Loop(Method):
    """Plain autograd, one sample at a time, with running sums."""

    def step(self, samples: Sequence[Sample]) -> None:
        """Each sample alone, unpadded."""
        parameters = list(self.model.parameters())
        for sample in samples:
            loss = self.losses(self.objective.collate(self.model, [sample])).sum()
            for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                if id(p) in self.names and self.names[id(p)] in self.sums:
                    self.sums[self.names[id(p)]].addcmul_(g, g)
                else:
                    self.add(p, g.square())
        self.seen += len(samples)


class Published(Method):
    """As the paper's scripts do: every sample's gradients are kept; a chunk of them is then stacked and squared.

    The chunk is the batch here. The work per sample is that of the scripts, whose chunk is 100; their memory is not.
    """

    def step(self, samples: Sequence[Sample]) -> None:
        """Keep, stack, square, sum."""
        kept: list[list[Tensor]] = []
        for sample in samples:
            self.model.zero_grad(set_to_none=True)
            self.losses(self.objective.collate(self.model, [sample])).sum().backward()
            kept.append([p.grad.detach().cpu().clone() for p in self.model.parameters() if p.grad is not None])
        self.model.zero_grad(set_to_none=True)
        for parameter, gradients in zip(self.model.parameters(), zip(*kept, strict=True), strict=True):
            self.add(parameter, (torch.stack(gradients) ** 2).sum(0))
        self.seen += len(samples)


class PublishedInHundreds(Published):
    """The same, with as many samples' gradients kept as the scripts keep, 100, in whole batches: 96."""

    repeats = 12

    def step(self, samples: Sequence[Sample]) -> None:
        """One chunk of twelve such batches; of so many where memory is measured, too."""
        super().step(list(samples) * PublishedInHundreds.repeats)


class PublishedPadded(Published):
    """The same, and padded to 512 tokens as the scripts do."""

    def losses(self, batch: Batch, **inputs: Tensor) -> Tensor:
        """From the full logits of 512 positions."""
        more = max(0, 512 - batch.targets.shape[1])
        padded = {k: F.pad(v, (0, more)) for k, v in batch.inputs.items()}
        long = Batch(padded, F.pad(batch.targets, (0, more), value=IGNORE), F.pad(batch.weights, (0, more)))
        return super().losses(long, **inputs)


class Vmap(Method):
    """``torch.func.vmap`` of ``grad``: all gradients of the batch, squared and summed.

    A padded masked LM gets its mask ready made and additive, since vmap cannot trace the one that transformers makes; a
    next-token model needs none when it is padded on the right.
    """

    chunk: int | None = None

    def prepare(self, samples: Sequence[Sample]) -> None:
        """The function of one sample, mapped."""
        self.model.requires_grad_(False)
        # Attention written out has a rule under vmap; the fused one is run sample by sample.
        self.model.set_attn_implementation("eager")
        self.model.config.pad_token_id = None  # spares a look at the tokens' values, which vmap refuses
        parameters: dict[str, Tensor] = dict(self.model.named_parameters())

        def loss(values: dict[str, Tensor], ids: Tensor, mask: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
            inputs: dict[str, Tensor] = {"input_ids": ids[None]}
            if self.objective.name == "mlm":
                inputs["attention_mask"] = mask[None, None, None]
            logits = functional_call(self.model, values, (), inputs).logits[0]
            return (F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none") * weights).sum()

        self.mapped = vmap(grad(loss), in_dims=(None, 0, 0, 0, 0), chunk_size=self.chunk)
        self.parameters = parameters

    def step(self, samples: Sequence[Sample]) -> None:
        """All gradients, then their squares."""
        batch = self.objective.collate(self.model, samples)
        mask = (1.0 - batch.inputs["attention_mask"]) * torch.finfo(torch.float32).min
        gradients = self.mapped(self.parameters, batch.inputs["input_ids"], mask, batch.targets, batch.weights.float())
        for name in list(gradients):
            self.add(self.parameters[name], gradients.pop(name).square_().sum(0))
        self.seen += len(samples)


class VmapInTwos(Vmap):
    """The same, two samples at a time."""

    chunk = 2
