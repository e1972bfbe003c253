"""Finding by running a model which of its operations are per sample, and proving it on the first samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from guided_dropout.fisher.fast import BatchedSquares, Capture, Plan
from guided_dropout.fisher.operations import Key, ParameterOperations
from guided_dropout.fisher.rules import EMBEDDING, Call, Rule
from guided_dropout.objectives import Objective, Sample

# Where a shortcut does not suit a model, one of these comes up in its forward.
_UNSUITED = (RuntimeError, ValueError, TypeError, IndexError, AttributeError)


def make_plan(model: nn.Module, objective: Objective, parameters: Mapping[str, nn.Parameter], sample: Sample) -> Plan:
    """Find by running `model` on two and on three copies of a sample which operations are per sample.

    Shortcuts (the head at target positions only; embeddings that the batch shares looked up per sample) are taken only
    where they leave the logits as they are.
    """
    shapes: list[dict[Key, tuple[str, torch.Size]]] = []
    for copies in (2, 3):
        seen: dict[Key, tuple[str, torch.Size]] = {}

        def visit(rule: Rule, call: Call, keys: dict[str, Key], seen: dict[Key, tuple[str, torch.Size]] = seen) -> None:
            seen.update(dict.fromkeys(keys.values(), (rule.name, call.x.shape)))

        batch = objective.collate(model, [sample] * copies)
        mode = ParameterOperations({id(p): n for n, p in parameters.items()}, visit)
        with torch.no_grad(), mode:
            model(**batch.inputs)
        shapes.append(seen)
    layouts = {k: kind for k in shapes[0] if k in shapes[1] and (kind := _layout_kind(shapes[0][k], shapes[1][k]))}
    unshared = {k: v for k, v in layouts.items() if v != "shared"}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for candidate in (Plan(layouts, head), Plan(unshared, head), Plan(layouts, None)):
        candidate = _with_head_layout(candidate, model, parameters)
        if _keeps_logits(model, objective, parameters, candidate, sample):
            return candidate
    return Plan(unshared, None)


def _layout_kind(two: tuple[str, torch.Size], three: tuple[str, torch.Size]) -> str | None:
    (rule, a), (_, b) = two, three
    is_lookup = rule == EMBEDDING.name
    if len(a) != len(b) or len(a) < (1 if is_lookup else 2):
        return None
    if a[0] == 2 and b[0] == 3:
        return "batch"
    if len(a) == 2 and not is_lookup and a[0] % 2 == 0 and a[0] // 2 * 3 == b[0]:
        return "flat"
    if is_lookup and a == b and (len(a) == 1 or (len(a) == 2 and a[0] == 1)):
        return "shared"
    return None


def _with_head_layout(plan: Plan, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Plan:
    """The head's own parameters get the head's layout in their last operation, which is the head's."""
    if plan.head is None:
        return plan
    own = {id(p) for p in plan.head.parameters(recurse=False)}
    layouts = dict(plan.layouts)
    for name in (n for n, p in parameters.items() if id(p) in own):
        uses = [k for k in layouts if k[0] == name]
        if uses:
            layouts[max(uses)] = "head"
    return replace(plan, layouts=layouts)


def _keeps_logits(
    model: nn.Module, objective: Objective, parameters: Mapping[str, nn.Parameter], plan: Plan, sample: Sample
) -> bool:
    batch = objective.collate(model, [sample] * 2)
    with torch.no_grad():
        plain = batch.at_targets(model(**batch.inputs).logits)
    try:
        capture = Capture(BatchedSquares(model, objective, parameters, plan), batch)
        logits = capture.forward().detach()
    except _UNSUITED:
        return False
    logits = logits if plan.head is not None else batch.at_targets(logits)
    return logits.shape == plain.shape and torch.allclose(logits, plain, rtol=1e-3, atol=1e-4)
