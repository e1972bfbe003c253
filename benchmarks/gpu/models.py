"""The whole estimator on whole models, beside a plain forward and backward of the same batch."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from measure import free, interleaved, ratios
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from guided_dropout import estimate_fisher
from guided_dropout.fisher.check import checked_plan
from guided_dropout.fisher.fast import BatchedSquares
from guided_dropout.fisher.kernels import backend
from guided_dropout.fisher.places import Plan, head_at
from guided_dropout.objectives import IGNORE, Objective

BERT = {"vocab_size": 30522}  # BERT-base: 12 layers of 768, the family's defaults
LLAMA = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
    "max_position_embeddings": 2048,
}
TINY = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}


@dataclass(frozen=True)
class Case:
    """A model with random weights and the batches it is given.

    Attributes:
        family: transformers' model type; ``"bert"`` is a masked LM, all else predicts the next token.
        options: of its configuration.
        tokens: in each sample.
        samples: in a batch.
        dtype: of the weights.
        share: of the tokens that are targets.
    """

    family: str
    options: dict[str, Any]
    tokens: int
    samples: int
    dtype: torch.dtype
    share: float = 1.0


def cases(*, quick: bool) -> dict[str, Case]:
    """Piece → case, the cheapest first."""
    if quick:
        return {
            "bert-tiny-float32": Case("bert", TINY, 8, 3, torch.float32, 0.15),
            "llama-tiny-bfloat16": Case("llama", TINY, 8, 2, torch.bfloat16),
        }
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        found[f"bert-base-128-{name}"] = Case("bert", BERT, 128, 32, dtype, 0.15)
        found[f"bert-base-512-{name}"] = Case("bert", BERT, 512, 16, dtype, 0.15)
        tied = {**LLAMA, "vocab_size": 128256, "tie_word_embeddings": True}
        found[f"llama-1b-128k-512-{name}"] = Case("llama", tied, 512, 8, dtype)
        untied = {**LLAMA, "vocab_size": 32000, "tie_word_embeddings": False}
        found[f"llama-1b-32k-512-{name}"] = Case("llama", untied, 512, 8, dtype)
    return found


def fisher(device: torch.device, case: Case, *, rounds: int) -> dict[str, Any]:
    """Time and memory of a batch's Fisher, and of a plain forward and backward of the same batch."""
    model = _model(case, device)
    objective = Objective("mlm" if case.family == "bert" else "causal")
    model.config.use_cache = False  # as the estimator has it
    samples = _samples(model, case)
    parameters = dict(model.named_parameters())
    model.requires_grad_(False)
    plan = checked_plan(model, objective, parameters, samples)
    result = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": case.tokens,
        "samples": case.samples,
        "dtype": str(case.dtype),
        "backend": backend(device, case.dtype),
        "goal": 1.10,
        **_batch(model, objective, parameters, plan, samples, device, rounds),
    }
    free()
    start = time.perf_counter()
    profile = estimate_fisher(model, samples * 2, batch_size=case.samples)
    result["estimate_fisher"] = {"batches": 2, "seconds": time.perf_counter() - start, "samples": profile.num_samples}
    return result


def _batch(
    model: PreTrainedModel,
    objective: Objective,
    parameters: dict[str, torch.nn.Parameter],
    plan: Plan,
    samples: list[dict[str, torch.Tensor]],
    device: torch.device,
    rounds: int,
) -> dict[str, Any]:
    squares = BatchedSquares(model, objective, parameters, plan)

    def plain(*, head_at_targets: bool) -> None:
        model.requires_grad_(True)
        batch = objective.collate(model, samples)
        targets = batch.targets != IGNORE
        if head_at_targets:
            with head_at(plan.head, lambda x: x[targets]):
                logits = model(**batch.inputs).logits
            weights = batch.weights[targets].to(logits.dtype)
            loss = torch.nn.functional.cross_entropy(logits, batch.targets[targets], reduction="none") @ weights
        else:
            loss = objective.losses(model(**batch.inputs).logits, batch).sum()
        loss.backward()
        model.zero_grad(set_to_none=True)
        model.requires_grad_(False)

    ways = {"fisher": lambda: squares.add(samples), "plain, full logits": lambda: plain(head_at_targets=False)}
    if plan.head is not None:
        ways["plain, head at targets"] = lambda: plain(head_at_targets=True)
    times = interleaved(ways, device, rounds=rounds)
    return {
        "times": times,
        "fisher_over": ratios(times, "fisher"),
        "totals_bytes": sum(squares.totals[n].nbytes for n in squares.totals),  # held besides the peak
        "fallback": sorted(squares.fallback),
    }


def _model(case: Case, device: torch.device) -> PreTrainedModel:
    auto = AutoModelForMaskedLM if case.family == "bert" else AutoModelForCausalLM
    torch.manual_seed(0)
    with torch.device(device):
        return auto.from_config(AutoConfig.for_model(case.family, **case.options), dtype=case.dtype).eval()


def _samples(model: PreTrainedModel, case: Case) -> list[dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(case.samples):
        ids = torch.randint(5, model.config.vocab_size, (case.tokens,), generator=g)
        labels = torch.where(torch.rand(case.tokens, generator=g) < case.share, ids, IGNORE)
        labels[-1] = ids[-1]  # so that no sample is without a target
        samples.append({"input_ids": ids, "labels": labels})
    return samples
