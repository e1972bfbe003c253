"""Whether the rates of a schedule arrive in a model's forward, and whether the model comes back."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from benchmarks.architectures.fisher import samples
from benchmarks.architectures.models import build
from benchmarks.architectures.state import changed, snapshot
from benchmarks.architectures.words import line
from guided_dropout import DropoutSchedule, apply_dropout
from guided_dropout.errors import GuidedDropoutError
from guided_dropout.sites import find_sites

_SDPA = "scaled_dot_product_attention"


class _Rates(TorchFunctionMode):
    """The rates of the dropout and attention calls, read from their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[float] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if "dropout" in name:
            rate = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
            if kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True)):
                self.seen.add(float(rate))
        elif name == _SDPA:
            self.seen.add(float(kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0)))
        return func(*args, **kwargs)


def dropout_row(kind: str, model_type: str) -> dict[str, Any]:
    """What became of distinct rates at all sites: ``status`` is arrives, none, wrong, refused, failed or not run."""
    model = build(kind, model_type)
    inputs = _inputs(kind, model)
    try:
        _rates(model, inputs)
    except Exception as e:
        return {"status": "not run", "message": line(e)}
    next(model.children()).train()  # flags that differ have to come back too
    before = snapshot(model)
    row: dict[str, Any] = {}
    try:
        sites = find_sites(model)
        row["sites"] = len(sites)
        if not sites:
            return {"status": "none", **row, "changed": changed(before, snapshot(model))[:5]}
        rates = {s.path: 0.05 + 0.9 * (i + 1) / (len(sites) + 2) for i, s in enumerate(sites)}
        with apply_dropout(model, DropoutSchedule.from_rates(rates, model)):
            flags = [(module, module.training) for module in model.modules()]
            seen = _rates(model, inputs)
            for module, flag in flags:
                module.training = flag
    except Exception as e:
        status = "refused" if isinstance(e, GuidedDropoutError) else "failed"
        return {"status": status, "message": line(e), **row, "changed": changed(before, snapshot(model))[:5]}
    row["unheard"] = sorted(path for path, rate in rates.items() if rate not in seen)
    row["strays"] = sorted(seen - {0.0, *rates.values()})
    row["changed"] = changed(before, snapshot(model))[:5]
    return {"status": "wrong" if any(row[k] for k in ("unheard", "strays", "changed")) else "arrives", **row}


def _inputs(kind: str, model: PreTrainedModel) -> dict[str, Any]:
    longest = max(samples(kind, model), key=lambda row: len(row["input_ids"]))
    inputs = {"input_ids": torch.stack([longest["input_ids"]] * 2)}
    if kind == "seq2seq" and model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.stack([longest["labels"]] * 2)
    return inputs


def _rates(model: PreTrainedModel, inputs: dict[str, Any]) -> set[float]:
    """The rates met in one training-mode forward, after which buffers are what they were (I-BERT's ranges move)."""
    torch.manual_seed(0)
    model.train()
    before = [
        (module, {n: b if b is None else b.clone() for n, b in module._buffers.items()}) for module in model.modules()
    ]
    with torch.no_grad(), _Rates() as rates:
        model(**inputs)
    for module, buffers in before:
        module._buffers.update(buffers)
    return rates.seen
