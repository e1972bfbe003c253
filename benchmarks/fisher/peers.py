"""Other libraries' ways to a diagonal Fisher, each set up as its documentation says and as well as the model allows."""

# What is compared with is installed for that alone.
# pyright: reportMissingImports=false

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.fisher.cases import Sample
from benchmarks.fisher.methods import Method, sample_losses
from guided_dropout.objectives import Batch


def _positions(batch: Batch) -> dict[str, Tensor]:
    """Positions and token types of each sample, so that no embedding is looked up once for the whole batch."""
    ids = batch.inputs["input_ids"]
    return {"position_ids": torch.arange(ids.shape[1]).expand_as(ids).contiguous()}


class _SummedLoss(nn.Module):
    """A batch's losses, added up; ASDL asks for a module with a `reduction`."""

    reduction = "sum"

    def __init__(self, batch: Batch):
        super().__init__()
        self.batch = batch

    def forward(self, logits: Tensor) -> Tensor:
        """[B, T, V] → scalar."""
        return sample_losses(logits, self.batch).sum()


class Opacus(Method):
    """``GradSampleModule``: per-sample gradients by hooks, then squared and summed."""

    imports = ("opacus.grad_sample",)

    def prepare(self, samples: Sequence[Sample]) -> None:
        """Wrap the model; the hooks work in training mode only (there is no dropout)."""
        from opacus.grad_sample import GradSampleModule

        for m in self.model.modules():  # BERT's head also holds its decoder's bias; a module that has children and
            below = {id(p) for c in m.children() for p in c.parameters()}  # a parameter would be taken as one layer
            for name in [n for n, p in m.named_parameters(recurse=False) if id(p) in below]:
                delattr(m, name)
        self.wrapped = GradSampleModule(self.model.train(), loss_reduction="sum", strict=False)

    def step(self, samples: Sequence[Sample]) -> None:
        """Backward, square, sum."""
        batch = self.objective.collate(self.model, samples)
        inputs = {**batch.inputs, **_positions(batch)}
        if "bert" in self.model.config.model_type:
            inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        sample_losses(self.wrapped(**inputs).logits, batch).sum().backward()
        for p in self.model.parameters():
            gradients: Any = getattr(p, "grad_sample", None)
            if gradients is not None:
                self.add(p, gradients.square_().sum(0))
        self.wrapped.zero_grad(set_to_none=True)
        self.seen += len(samples)


class Kronfluence(Method):
    """The diagonal strategy's lambda matrices: linear layers only, weight and bias in one matrix."""

    imports = ("kronfluence", "kronfluence.module.utils")

    def prepare(self, samples: Sequence[Sample]) -> None:
        """Wrap the modules that the library covers."""
        from kronfluence.arguments import FactorArguments
        from kronfluence.module.tracked_module import ModuleMode, TrackedModule
        from kronfluence.module.utils import set_mode, wrap_tracked_modules

        self.model.requires_grad_(False)
        arguments = FactorArguments(strategy="diagonal", use_empirical_fisher=True)
        self.model = wrap_tracked_modules(self.model, factor_args=arguments)  # pyright: ignore[reportAttributeAccessIssue]
        set_mode(self.model, ModuleMode.LAMBDA, release_memory=True)
        self.tracked = [m for m in self.model.modules() if isinstance(m, TrackedModule)]

    def step(self, samples: Sequence[Sample]) -> None:
        """Backward; the hooks do the rest."""
        self.model.zero_grad(set_to_none=True)
        self.losses(self.objective.collate(self.model, samples)).sum().backward()
        self.seen += len(samples)

    def fisher(self) -> dict[str, Tensor]:
        """From the lambda matrices."""
        from kronfluence.utils.constants import LAMBDA_MATRIX_NAME

        found = {}
        for m in self.tracked:
            matrix, linear = m.storage[LAMBDA_MATRIX_NAME] / self.seen, m.original_module
            found[self.names[id(linear.weight)]] = matrix[:, : linear.in_features]
            if linear.bias is not None:
                found[self.names[id(linear.bias)]] = matrix[:, -1]
        return found


class Asdl(Method):
    """The empirical Fisher of shape ``diag``."""

    imports = ("asdl",)

    def prepare(self, samples: Sequence[Sample]) -> None:
        """Make the library's Fisher maker."""
        import asdl

        config = asdl.FisherConfig(fisher_type=asdl.FISHER_EMP, fisher_shapes=[asdl.SHAPE_DIAG], data_size=1)
        self.maker = asdl.get_fisher_maker(self.model, config)

    def step(self, samples: Sequence[Sample]) -> None:
        """Forward and backward through the maker."""
        batch = self.objective.collate(self.model, samples)
        output = self.maker.setup_model_call(self.model, **batch.inputs, **_positions(batch))
        self.maker.setup_loss_call(_SummedLoss(batch), output.logits)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the library uses hooks that torch advises against
            self.maker.forward_and_backward()
        for m in self.model.modules():
            diagonal: Any = getattr(getattr(m, "fisher", None), "diag", None)
            for role in ("weight", "bias"):
                squares = getattr(diagonal, role, None)
                if squares is not None:
                    self.add(getattr(m, role), squares)
        self.maker.zero_fisher()
        self.seen += len(samples)


class BackPack(Method):
    """``SumGradSquared`` on the module types that the library covers."""

    imports = ("backpack", "backpack.extensions")
    field = "sum_grad_squared"

    def prepare(self, samples: Sequence[Sample]) -> None:
        """Extend the covered modules; the others keep plain autograd."""
        from backpack import extend
        from backpack.extensions import BatchGrad, SumGradSquared

        self.extension = SumGradSquared() if self.field == "sum_grad_squared" else BatchGrad()
        for m in self.model.modules():
            if isinstance(m, nn.Embedding):
                m.padding_idx = None  # refused otherwise; no sample holds the padding token outside its padding
            if isinstance(m, (nn.Linear, nn.Embedding)):
                extend(m)

    def step(self, samples: Sequence[Sample]) -> None:
        """Backward within the library's context."""
        from backpack import backpack

        batch = self.objective.collate(self.model, samples)
        extra = _positions(batch)
        if "bert" in self.model.config.model_type:
            extra["token_type_ids"] = torch.zeros_like(batch.inputs["input_ids"])
        loss = self.losses(batch, **extra).sum()
        with backpack(self.extension):
            loss.backward()
        for p in self.model.parameters():
            found = getattr(p, self.field, None)
            if found is not None:
                self.add(p, found if self.field == "sum_grad_squared" else found.square_().sum(0))
                delattr(p, self.field)
        self.model.zero_grad(set_to_none=True)
        self.seen += len(samples)


class BackPackBatchGrad(BackPack):
    """``BatchGrad``, squared and summed."""

    field = "grad_batch"
