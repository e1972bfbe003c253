r"""Observation 1: near the optimum the diagonal of the empirical Fisher approximates that of the Hessian. Does it?

python -m benchmarks.fidelity.hessian MODEL --text TEXT --out FILE.json

The Hessian is that of the mean loss over the samples, :math:`H = \nabla^2 \frac1N \sum_i \ell_i`; its diagonal is
estimated by Hutchinson's method (Bekas et al., 2007; PyHessian, Yao et al., 2020) with M Rademacher vectors v:
:math:`\operatorname{diag} H \approx \frac1M \sum_v v \odot H v`, each :math:`Hv` by a double backward over all samples.
The Fisher is that of the same samples. Compared are, by rank (Spearman): the values of the parameters of each tensor,
pooled by the tensor's kind and layer; and the tensors' means, which the schedule depends on.

The Monte Carlo error is shown by two independent halves of the vectors: with r the rank correlation between their
estimates, no comparison with a perfect Hessian can be expected to show more than about :math:`\sqrt{2 r / (1 + r)}`
(the reliability of the whole after Spearman and Brown); means over many elements are far less noisy than elements.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from guided_dropout import estimate_fisher
from guided_dropout.artefacts import write_json
from guided_dropout.cli_shared import open_text
from guided_dropout.detection import detect_objective
from guided_dropout.inputs import text_inputs
from guided_dropout.models import load_lm, load_tokenizer
from guided_dropout.objectives import Objective, Sample
from guided_dropout.provenance import provenance
from guided_dropout.schedule.kinds import tensor_places
from guided_dropout.undisturbed import evaluating


def hutchinson(
    model: nn.Module,
    objective: Objective,
    samples: Sequence[Sample],
    *,
    vectors: int,
    seed: int,
    batch_size: int = 16,
) -> Iterator[dict[str, Tensor]]:
    r"""For each Rademacher vector :math:`v \odot H v`, name → tensor of the parameter's shape.

    The attention must be one that can be differentiated twice: ``attn_implementation="eager"``.
    """
    with evaluating(model):
        parameters = dict(model.named_parameters())
        for p in parameters.values():
            p.requires_grad_(True)
        for number in range(vectors):
            generator = torch.Generator().manual_seed(seed * 100_003 + number)
            v = {n: torch.randint(0, 2, p.shape, generator=generator).to(p) * 2 - 1 for n, p in parameters.items()}
            product = {n: torch.zeros_like(p) for n, p in parameters.items()}
            for start in range(0, len(samples), batch_size):
                batch = objective.collate(model, samples[start : start + batch_size])
                loss = objective.losses(model(**batch.inputs).logits, batch).sum() / len(samples)
                gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True, allow_unused=True)
                dot = sum((g * x).sum() for g, x in zip(gradients, v.values(), strict=True) if g is not None)
                second = torch.autograd.grad(dot, list(parameters.values()), allow_unused=True)  # pyright: ignore
                for name, hv in zip(parameters, second, strict=True):
                    if hv is not None:
                        product[name] += hv
            yield {n: v[n] * product[n] for n in parameters}


def compare(
    fisher: Mapping[str, Tensor], halves: Sequence[Mapping[str, Tensor]], noise: Sequence[str]
) -> dict[str, Any]:
    """Rank correlations of a Fisher diagonal with two independent estimates of the Hessian's."""
    places = tensor_places({n: tuple(t.shape) for n, t in fisher.items()})
    names = [n for n in fisher if n not in noise]
    hessian = {n: (halves[0][n] + halves[1][n]) / 2 for n in names}
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        layer = {None: "after", -1: "before"}.get(places[name].layer, str(places[name].layer))
        groups.setdefault((layer, places[name].kind), []).append(name)
    rows = []
    for (layer, kind), members in groups.items():
        f, h, a, b = (_flat(x, members) for x in (fisher, hessian, *halves))
        r = _rank_correlation(a, b)
        rows.append(
            {
                "layer": layer,
                "kind": kind,
                "parameters": len(f),
                "spearman": _rank_correlation(f, h),
                "between_halves": r,
                "ceiling": float(np.sqrt(2 * r / (1 + r))) if r > 0 else None,
                "negative": float((h < 0).mean()),
            }
        )
    f, h, a, b = (np.array([x[n].double().mean().item() for n in names]) for x in (fisher, hessian, *halves))
    return {
        "by_layer": rows,
        "tensor_means": {
            "tensors": len(names),
            "spearman": _rank_correlation(f, h),
            "between_halves": _rank_correlation(a, b),
            "negative": int((h < 0).sum()),
        },
    }


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    result: Any = spearmanr(a, b)
    return float(result.statistic)


def _flat(tensors: Mapping[str, Tensor], names: Sequence[str]) -> np.ndarray:
    return torch.cat([tensors[n].double().flatten() for n in names]).numpy()


def main() -> None:
    """One model, one text, one JSON file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--vectors", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    model, tokenizer = load_lm(given.model, "auto", torch.float32), load_tokenizer(given.model)
    model.set_attn_implementation("eager")
    drawn = text_inputs(
        model, tokenizer, open_text(given.text, 20_000_000),
        num_samples=given.samples, max_length=given.max_length, seed=given.seed,
    )  # fmt: skip
    samples = list(drawn.samples)
    profile = estimate_fisher(model, samples)
    objective = detect_objective(model, samples[0])
    halves = [{n: torch.zeros_like(p) for n, p in model.named_parameters()} for _ in range(2)]
    products = hutchinson(model, objective, samples, vectors=2 * (given.vectors // 2), seed=given.seed)
    for number, product in enumerate(products):
        for name, values in product.items():
            halves[number % 2][name] += values / (given.vectors // 2)
    result = compare(profile.diagonal, halves, profile.noise)
    facts = provenance(model=profile.model, vectors=2 * (given.vectors // 2), num_samples=len(samples), **drawn.facts)
    write_json(given.out, {"kind": "fisher-against-hessian", "schema": 1, **result, "provenance": facts})


if __name__ == "__main__":
    main()
