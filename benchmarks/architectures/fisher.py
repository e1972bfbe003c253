"""A model's Fisher in padded batches beside a plain loop over the samples."""

from __future__ import annotations

import copy
import inspect
import math
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.architectures.models import LABELS, build
from benchmarks.architectures.state import changed, snapshot
from benchmarks.architectures.words import line
from guided_dropout import estimate_fisher
from guided_dropout.errors import GuidedDropoutError

EXACT = {"float64": 1e-5, "float32": 1e-3}
"""Relative error of a tensor's mean up to which it is called exact."""
_ZERO = {"float64": 1e-13, "float32": 1e-9}  # of the largest mean: what is smaller is a zero with rounding
_NOISE = 1e-9  # of the largest mean: below, a mean is looked at with another scale of the loss
_LENGTHS = (9, 24, 11, 7, 20, 9, 14, 5)
_TOKENS = (6, 61)  # beyond the special ones, within the vocabulary
_END = 2


def samples(kind: str, model: PreTrainedModel) -> list[dict[str, Tensor]]:
    """Eight samples of mixed lengths, some with targets at all positions, some at a few."""
    generator = torch.Generator().manual_seed(1)
    made: list[dict[str, Tensor]] = []
    for i, length in enumerate(_LENGTHS):
        ids = torch.randint(*_TOKENS, (length,), generator=generator)
        if kind == "classifier":
            ids[-1] = _END
            made.append({"input_ids": ids, "labels": torch.tensor(i % LABELS)})
            continue
        labels = ids.clone()
        if kind == "seq2seq" and model.config.is_encoder_decoder:
            labels = torch.randint(*_TOKENS, (length // 2 + 1,), generator=generator)
        elif i % 2 or kind == "masked":
            labels = torch.where(torch.rand(length, generator=generator) < 0.4, ids, -100)
            labels[-1] = ids[-1]
        made.append({"input_ids": ids, "labels": labels})
    return made


def plain_means(model: PreTrainedModel, rows: list[dict[str, Tensor]], scale: float = 1.0) -> dict[str, float]:
    """Parameter → mean over its elements and the samples of the squared gradient, by the model's own loss.

    The loss is multiplied by `scale` and the result divided by its square, which moves rounding alone.

    Raises:
        ArithmeticError: a loss or a gradient is not finite.
        Exception: whatever the model raises where it does not run.
    """
    model = copy.deepcopy(model).eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    takes = inspect.signature(model.forward).parameters
    totals = {name: 0.0 for name, _ in model.named_parameters()}
    for row in rows:
        model.zero_grad(set_to_none=True)
        inputs: dict[str, Any] = {name: tensor[None] for name, tensor in row.items()}
        if "attention_mask" in takes:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if "use_cache" in takes:
            inputs["use_cache"] = False
        loss = model(**inputs).loss
        if not loss.isfinite():
            raise ArithmeticError(f"its loss of a sample alone is {loss.item()}")
        (scale * loss).backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                totals[name] += p.grad.double().square().mean().item()
    if bad := [name for name, total in totals.items() if not math.isfinite(total)]:
        raise ArithmeticError(f"its gradient of {bad[0]} is not finite, with a sample alone")
    return {name: total / (len(rows) * scale**2) for name, total in totals.items()}


def fisher_row(kind: str, model_type: str) -> dict[str, Any]:
    """What became of the Fisher: ``status`` is exact, wrong, refused, failed or, where the plain loop cannot, not run.

    In float64, or in float32 where the plain loop does not run in float64.
    """
    model, want, again, alone = build(kind, model_type), None, {}, ""
    rows = samples(kind, model)
    for dtype in (torch.float64, torch.float32):
        try:
            model = build(kind, model_type).to(dtype)  # pyright: ignore[reportArgumentType]
            want, again = plain_means(model, rows), plain_means(model, rows, scale=0.7)
        except Exception as e:
            alone = line(e)
        else:
            break
    name = str(model.dtype).removeprefix("torch.")
    row: dict[str, Any] = {"dtype": name, **({"message": alone} if want is None else {})}
    before = snapshot(model)
    try:
        profile = estimate_fisher(model, rows, batch_size=3)
    except Exception as e:
        said = "refused" if isinstance(e, GuidedDropoutError) else "failed"
        row |= {"status": "not run", "estimator": f"{said}: {line(e)}"} if want is None else {}
        return {"status": said, "message": line(e), **row, "changed": changed(before, snapshot(model))[:5]}
    row |= {"parameters_by_rule": profile.coverage["parameters_by_rule"], "objective": profile.objective}
    row["loop"] = sorted(set(profile.coverage["reasons"].values()))
    row["changed"] = changed(before, snapshot(model))[:5]
    if want is None:
        return {"status": "not run", "estimator": "gave a profile", **row}
    row["noise"] = _noise(want, again)
    want = {n: w for n, w in want.items() if n not in row["noise"]}
    worst, error = _worst(want, profile.tensor_means, _ZERO[name])
    status = "exact" if error <= EXACT[name] else "wrong"
    return {"status": status, "worst": error if math.isfinite(error) else None, "tensor": worst, **row}


def _noise(want: dict[str, float], again: dict[str, float]) -> list[str]:
    """Tensors with tiny means that another scale of the loss changes: zeros, but for rounding."""
    tiny = _NOISE * max(want.values())
    return [n for n, w in want.items() if w < tiny and abs(again[n] - w) > 1e-3 * w]


def _worst(want: dict[str, float], found: Mapping[str, float], zero: float) -> tuple[str, float]:
    """The tensor whose mean is farthest off, and by how much: infinity where it is missing or not finite."""
    floor = zero * max(want.values()) or sys.float_info.min
    errors = {n: abs(found.get(n, math.inf) - w) / (w + floor) for n, w in want.items()}
    errors = {n: math.inf if math.isnan(e) else e for n, e in errors.items()}
    worst = max(errors, key=errors.__getitem__)
    return worst, errors[worst]
