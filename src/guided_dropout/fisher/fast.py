"""Squares of the per-sample gradients of a whole batch, from one forward and one backward.

Parameters that meet an operation whose samples cannot be told apart are left to the reference loop, for that batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from guided_dropout.fisher.capture import Capture
from guided_dropout.fisher.places import Plan
from guided_dropout.fisher.reference import sum_of_squares
from guided_dropout.fisher.shortcuts import IndirectError
from guided_dropout.fisher.totals import Totals
from guided_dropout.fisher.uses import Uses
from guided_dropout.objectives import Batch, Objective, Sample
from guided_dropout.undisturbed import requiring_grad


@dataclass(frozen=True)
class Added:
    """What one batch was.

    Attributes:
        losses: [B], one per sample.
        tensor_sums: name → [B] float64, each sample's sum of squares over the parameter's elements; None unless asked.
    """

    losses: Tensor
    tensor_sums: dict[str, Tensor] | None = None


class BatchedSquares:
    """Adds up the squares of the per-sample gradients, batch by batch.

    Args:
        scores_only: keep only each parameter's sum over its elements, with no memory of the parameters' size.
        per_sample: give each sample's sums with each batch.
        targets_at_once: how many targets the head sees at a time, where it can be run in parts (see `late`).

    Attributes:
        totals: the running sums.
        fallback: parameters that took the reference loop in any batch → why.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        parameters: Mapping[str, nn.Parameter],
        plan: Plan,
        *,
        scores_only: bool = False,
        per_sample: bool = False,
        targets_at_once: int | None = None,
    ):
        self.model, self.objective, self.parameters, self.plan = model, objective, parameters, plan
        self.totals = Totals(parameters, scores_only=scores_only)
        self.per_sample, self.targets_at_once = per_sample, targets_at_once
        self.fallback: dict[str, str] = dict(plan.fallback)

    def add(self, samples: Sequence[Sample]) -> Added:
        """Add a batch of samples, unless any loss is not finite."""
        batch = self.objective.collate(self.model, samples)
        found = None
        with suppress(IndirectError):  # not seen when the plan was made; nothing has been added yet
            found = self._run(batch)
        if found is None:  # not where the error is, which would hold all that was computed
            self.plan = replace(self.plan, late=None, start=None)
            found = self._run(batch)
        uses, losses = found
        if not losses.isfinite().all():
            return Added(losses)
        skipped = {**uses.uncovered, **self.plan.fallback}
        self.fallback.update(skipped)
        if skipped:
            self._add_by_reference(skipped, samples, uses.sums)
        if self.totals.scores_only:
            for name, sums in uses.sums.items():
                self.totals[name].add_(sums.sum())
        self.totals.counted(len(samples))
        return Added(losses, uses.sums if self.per_sample else None)

    def _run(self, batch: Batch) -> tuple[Uses, Tensor]:
        uses = Uses(self.parameters, self.totals, len(batch), unwanted=self.plan.fallback, with_sums=self.per_sample)
        capture = Capture(self.model, self.objective, self.parameters, self.plan, batch, uses, self.targets_at_once)
        return uses, capture.run()

    def _add_by_reference(self, names: Mapping[str, str], samples: Sequence[Sample], sums: dict[str, Tensor]) -> None:
        some = {n: self.parameters[n] for n in self.parameters if n in names}
        with requiring_grad(some.values()):
            for b, sample in enumerate(samples):
                for name, squares in sum_of_squares(self.model, some, [sample], self.objective).items():
                    if not self.totals.scores_only:
                        self.totals[name].add_(squares)
                    if name in sums:
                        sums[name][b] = squares.sum(dtype=torch.float64)
