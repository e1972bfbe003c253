"""Running sums over batches, in which nothing that is not finite ever stays.

A loss is looked at before its gradient is taken. Squares that overflow although the loss is finite show in the sums,
for good, so those are looked at now and then; the batches since the last look are kept, and run again one by one to
find the sample. Where each sample's means are wanted, they show such a batch at once.

What is not finite is a sample's own only if it is so alone: sliding windows in float64 leave rows of padding with
nothing to attend to, whose NaN reaches the whole sample. A batch in which no sample is to blame is added one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from guided_dropout.errors import DataError, ModelError, NotFiniteError
from guided_dropout.fisher.check import checked_plan
from guided_dropout.fisher.fast import Added, BatchedSquares
from guided_dropout.fisher.kernels import backend
from guided_dropout.fisher.places import Plan
from guided_dropout.fisher.reference import sum_of_squares
from guided_dropout.fisher.site_scores import Observer
from guided_dropout.fisher.stream import Item
from guided_dropout.fisher.totals import FLUSH_EVERY, Totals
from guided_dropout.objectives import Objective, Sample
from guided_dropout.undisturbed import requiring_grad

METHODS = ("batched", "reference")
NONFINITE = ("error", "skip")
# How many samples a message names.
_NAMED = 10
# A sample whose squares overflow in float32 has a sum that is not finite or larger.
_MOST = torch.finfo(torch.float32).max


class ReferenceSquares:
    """What `BatchedSquares` does, by the oracle: one sample at a time."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        parameters: Mapping[str, nn.Parameter],
        *,
        scores_only: bool = False,
    ):
        self.model, self.objective, self.parameters = model, objective, parameters
        self.totals = Totals(parameters, scores_only=scores_only)
        self.fallback = dict.fromkeys(parameters, "asked for")

    def add(self, samples: Sequence[Sample]) -> Added:
        """Add samples, unless any loss is not finite."""
        losses = losses_of(self.model, self.objective, samples)
        if losses.isfinite().all():
            with requiring_grad(self.parameters.values()):
                sums = sum_of_squares(self.model, self.parameters, samples, self.objective)
            for name, squares in sums.items():
                self.totals[name].add_(squares.sum(dtype=torch.float64) if self.totals.scores_only else squares)
            self.totals.counted(len(samples))
        return Added(losses)


class Accumulator:
    """Adds up squares sample by sample, and keeps what is not finite out.

    Args:
        model: in evaluation mode.
        objective: the loss.
        parameters: name → parameter.
        method: one of `METHODS`.
        nonfinite: ``"error"``: a sample whose loss or squares are not finite is an error that names it; ``"skip"``: it
            is left out and noted.
        scores_only: keep one number per parameter.
        observer: is told each sample's means.
        undoable: whether `take_back` will be asked for; takes float64 sums from the first `check` on.

    Attributes:
        num: samples that are in the sums.
        nonfinite: index of each sample that was left out.
        fallback: parameters that took the reference loop in any batch → why.
        noise: parameters whose true gradient is zero, as far as the first samples show.
        kernels: what squared the samples that are in the sums, as `kernels.backend` names it.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        parameters: Mapping[str, nn.Parameter],
        *,
        method: str = "batched",
        nonfinite: str = "error",
        scores_only: bool = False,
        observer: Observer | None = None,
        undoable: bool = False,
    ):
        if method not in METHODS:
            raise DataError(f"method {method!r}; expected one of {', '.join(METHODS)}")
        if nonfinite not in NONFINITE:
            raise DataError(f"nonfinite {nonfinite!r}; expected one of {', '.join(NONFINITE)}")
        self.model, self.objective, self.parameters = model, objective, parameters
        self.method, self._skip = method, nonfinite == "skip"
        self.scores_only, self.observer = scores_only, observer
        self._observed = observer.state() if observer else {}
        # Where nothing need be left out, sums in float32 are spared their second set.
        free = scores_only or any(p.dtype == torch.float64 for p in parameters.values())
        self._marks = self._skip or undoable or free
        self._unmarked = False  # whether there are sums that `_undo` would lose
        self.num = 0
        self.nonfinite: list[int] = []
        self._fallback: dict[str, str] = {}
        self.noise: set[str] = set()
        self.kernels: set[str] = set()
        self._squares: BatchedSquares | ReferenceSquares | None = None
        self._loaded: Mapping[str, Tensor] | None = None
        self._idle: Totals | None = None  # stands in for the sums until there is a batch
        self._unchecked: list[list[Item]] = []
        self._proved = False  # that the plan was made on samples whose squares are finite
        self._before: dict[str, Tensor] = {}

    @property
    def fallback(self) -> dict[str, str]:
        """Parameters that took the reference loop in any batch → why."""
        return self._fallback | (self._squares.fallback if self._squares else {})

    def add(self, batch: Sequence[Item]) -> None:
        """Add a batch.

        Raises:
            NotFiniteError: a loss is not finite, or squares of this batch or of an earlier one are not.
        """
        if sum(map(len, self._unchecked)) + len(batch) >= FLUSH_EVERY:
            self.check()
        squares = self._squares
        if squares is None:
            # The plan is checked on the first two; whether the others are finite shows as they are added.
            if not self._losses(batch[:2]).isfinite().all():
                batch = self._finite(batch, self._losses(batch))
            if not batch:
                return
            squares = self._begin(batch)
        if isinstance(squares, BatchedSquares) and squares.plan.unpadded and len({i.lengths for i in batch}) > 1:
            for _, alike in groupby(batch, lambda item: item.lengths):  # in their order, as an observer is told them
                self.add(list(alike))
            return
        while batch:
            added = squares.add(_samples(batch))
            if added.losses.isfinite().all():
                self._unchecked.append(list(batch))
                self.num += len(batch)
                if self.observer and added.tensor_sums:
                    own = {n: s.cpu().numpy() for n, s in added.tensor_sums.items()}
                    self.observer.add({n: s / self.parameters[n].numel() for n, s in own.items()})
                    if not all((s <= _MOST).all() for s in own.values()):
                        self._make_finite()
                return
            finite = self._finite(batch, self._losses_alone(batch, added.losses))
            if len(finite) == len(batch):
                for item in batch:
                    self.add([item])
                return
            batch = finite

    def check(self) -> None:
        """Make sure that all sums are finite, as they are whenever this returns.

        Raises:
            NotFiniteError: squares of a sample overflow; it is named.
        """
        if self._squares is None:
            return
        self._make_finite()
        self._unchecked, self._proved = [], True
        if self.observer:
            self._observed = self.observer.state()
        self._mark(self._squares.totals)

    def rehearse(self, batch: Sequence[Item]) -> bool:
        """Make the plan as the first batch makes it, and add nothing; before any batch or `load`.

        Returns:
            Whether there is a plan; there is none where no sample is finite.

        Raises:
            ModelError: as for `add`.
        """
        before = self._observed
        self.add(batch)
        self.check()
        self.num, self.nonfinite, self._observed = 0, [], before
        if self.observer:
            self.observer.load_state(before)
        if self._squares is None:
            return False
        self.clear()
        return True

    def clear(self) -> None:
        """Begin the sums anew from zero; call `check` first."""
        self.totals().clear()
        self._before, self._unmarked = {}, False

    def take_back(self, batch: Sequence[Item]) -> None:
        """Undo the batch that was added last; those since the last `check` are run again without it."""
        out = {item.index for item in batch}
        self.nonfinite = [index for index in self.nonfinite if index not in out]
        kept = [b for b in self._unchecked if b[0].index not in out]
        if self._squares is not None and len(kept) < len(self._unchecked):
            self._undo(self._squares.totals)
            self._run_again(kept)

    def _make_finite(self) -> None:
        """Leave out what overflows since the last look, or name it."""
        assert self._squares is not None
        totals, unchecked = self._squares.totals, self._unchecked
        if _all_finite(totals.total(name) for name in totals):
            return
        bad, again = self._overflowing()
        if not bad and (self._unmarked or len(again) == len(unchecked)):
            first, last = min(i.index for b in unchecked for i in b), max(i.index for b in unchecked for i in b)
            raise ModelError(
                f"the squared gradients of samples {first} to {last} are finite each, but not their sum; expected "
                "sums that fit the precision: load the model in float64"
            )
        if bad:
            self._leave_out(bad, "the squared gradients of", "overflow")
        self._run_again(again)
        self._make_finite()

    def _run_again(self, batches: Sequence[Sequence[Item]]) -> None:
        """Add these in place of what was added since the last look; the sums are undone already."""
        self.num -= sum(map(len, self._unchecked))
        self._unchecked = []
        if self.observer:
            self.observer.load_state(self._observed)
        batches = [batch for batch in batches if batch]
        if batches and not self._proved and isinstance(self._squares, BatchedSquares):
            # The plan may have been checked on what overflows, where everything seems to be wrong.
            self._squares.plan = self._plan(batches[0])
            self._squares.fallback = dict(self._squares.plan.fallback)
            self.noise = set(self._squares.plan.noise)
        for batch in batches:
            self.add(batch)

    def totals(self) -> Totals:
        """The sums, zeros where there was no sample. Call `check` first."""
        if self._squares is not None:
            return self._squares.totals
        if self._idle is None:
            self._idle = Totals(self.parameters, scores_only=self.scores_only)
            if self._loaded is not None:
                self._idle.load_state(self._loaded)
        return self._idle

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, facts) from which `load` goes on. Call `check` first."""
        facts = {"num": self.num, "nonfinite": self.nonfinite, "fallback": self.fallback, "noise": sorted(self.noise)}
        facts["kernels"] = sorted(self.kernels)
        if self.observer:
            facts["observer"] = self.observer.state()
        return self.totals().state(), facts

    def load(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Take up what `state` gave, before the first batch."""
        self.num, self.nonfinite = facts["num"], list(facts["nonfinite"])
        self._fallback, self.noise = dict(facts["fallback"]), set(facts["noise"])
        self.kernels |= set(facts.get("kernels", []))  # earlier states do not say
        if self.observer:
            self.observer.load_state(facts["observer"])
            self._observed = facts["observer"]
        self._loaded = tensors
        if self._squares is not None:
            self._take_up(self._squares.totals)

    def _plan(self, batch: Sequence[Item]) -> Plan:
        unpadded = any(item.unpadded for item in batch)
        return checked_plan(self.model, self.objective, self.parameters, _samples(batch), unpadded=unpadded)

    def _begin(self, batch: Sequence[Item]) -> BatchedSquares | ReferenceSquares:
        """Begun late: the plan's own check needs as much memory as the sums, and is done with it before they exist."""
        if self.method == "reference":
            squares = ReferenceSquares(self.model, self.objective, self.parameters, scores_only=self.scores_only)
            self.kernels.add("torch")
        else:
            plan = self._plan(batch)
            self.noise |= plan.noise
            self.kernels |= {backend(p.device, p.dtype) for p in self.parameters.values()}
            squares = BatchedSquares(
                self.model, self.objective, self.parameters, plan,
                scores_only=self.scores_only, per_sample=self.observer is not None,
            )  # fmt: skip
        self._idle = None
        self._take_up(squares.totals)
        self._squares = squares
        return squares

    def _take_up(self, totals: Totals) -> None:
        if self._loaded is not None:
            totals.load_state(self._loaded)
            self._loaded = None
            self._mark(totals)

    def _losses(self, batch: Sequence[Item]) -> Tensor:
        return losses_of(self.model, self.objective, _samples(batch))

    def _losses_alone(self, batch: Sequence[Item], losses: Tensor) -> Tensor:
        """`losses` of a batch; where they are not finite, those of the sample alone, without padding."""
        if len(batch) == 1:
            return losses
        suspects = ~losses.isfinite()
        alone = self._losses([item for item, suspect in zip(batch, suspects.tolist(), strict=True) if suspect])
        return losses.masked_scatter(suspects, alone.to(losses.dtype))

    def _finite(self, batch: Sequence[Item], losses: Tensor) -> list[Item]:
        """Those of `batch` whose loss is finite."""
        good = losses.isfinite().tolist()
        bad = [item.index for item, ok in zip(batch, good, strict=True) if not ok]
        if bad:
            self._leave_out(
                bad, "the loss of", f"is {', '.join(sorted({str(v) for v in losses[~losses.isfinite()].tolist()}))}"
            )
        return [item for item, ok in zip(batch, good, strict=True) if ok]

    def _leave_out(self, bad: Sequence[int], what: str, how: str) -> None:
        if not self._skip:
            # Longformer and LED make NaN of padding in float64 alone.
            double = any(p.dtype == torch.float64 for p in self.model.parameters())
            raise NotFiniteError(
                f"{what} {named(bad)} (from 0) {how}; expected finite numbers: load the model in "
                f"{'float32' if double else 'float32 or float64'}, leave the sample out, or let all such be left out "
                "and counted with --skip-nonfinite"
            )
        self.nonfinite.extend(bad)

    def _overflowing(self) -> tuple[list[int], list[list[Item]]]:
        """The samples since the last look whose squares are not finite; and the others, in batches to run again.

        The sums serve as scratch, and are undone.
        """
        squares, bad, again = self._squares, [], []
        assert squares is not None
        for batch in self._unchecked:
            if self._adds_finite(squares, batch):
                again.append(batch)
                continue
            alone = [self._adds_finite(squares, [item]) for item in batch]
            bad += [item.index for item, ok in zip(batch, alone, strict=True) if not ok]
            good = [item for item, ok in zip(batch, alone, strict=True) if ok]
            again += [[item] for item in batch] if all(alone) else [good]
        self._undo(squares.totals)
        return bad, again

    def _adds_finite(self, squares: BatchedSquares | ReferenceSquares, batch: Sequence[Item]) -> bool:
        self._undo(squares.totals)
        squares.add(_samples(batch))
        return _all_finite(squares.totals[name] for name in squares.totals)

    def _mark(self, totals: Totals) -> None:
        """What is in the sums now stays: float32 partial sums are flushed, so that zeroing them undoes what follows."""
        self._unmarked = not self._marks
        if self._unmarked:
            return
        totals.flush()
        self._before = {name: totals[name].clone() for name in totals if totals[name].dtype == torch.float64}

    def _undo(self, totals: Totals) -> None:
        """Back to what `_mark` saw."""
        for name in totals:
            before = self._before.get(name)
            totals[name].zero_() if before is None else totals[name].copy_(before)
        totals.flush()  # of zeros: it counts from here


def named(indices: Sequence[int]) -> str:
    """``sample 3``, or ``samples 3, 5 and 8``, as in messages; ten at most."""
    some = [str(i) for i in sorted(indices)[:_NAMED]]
    if len(indices) == 1:
        return f"sample {some[0]}"
    if len(indices) > _NAMED:
        return f"samples {', '.join(some)} and {len(indices) - _NAMED} more"
    return f"samples {', '.join(some[:-1])} and {some[-1]}"


def losses_of(model: nn.Module, objective: Objective, samples: Sequence[Sample]) -> Tensor:
    """The losses [B] of samples, each run alone, without gradients."""
    losses = []
    with torch.no_grad():
        for sample in samples:
            batch = objective.collate(model, [sample])
            losses.append(objective.losses(model(**batch.inputs).logits, batch))
    return torch.cat(losses)


def _all_finite(sums: Iterable[Tensor]) -> bool:
    """The largest of sums of squares is NaN or infinite where any is; and needs no memory."""
    return all(bool(t.max().isfinite()) for t in sums if t.numel())


def _samples(batch: Sequence[Item]) -> list[Sample]:
    return [item.sample for item in batch]
