r"""Observation 1: near the optimum the diagonal of the empirical Fisher approximates that of the Hessian. Does it?

python -m benchmarks.fidelity.hessian MODEL --text TEXT --out FILE.json

The Hessian is that of the mean loss over the samples, :math:`H = \nabla^2 \frac1N \sum_i \ell_i`; the Fisher is that of
the same samples. Two comparisons by rank (Spearman):

- *Parameters*: in each layer and kind of tensor, some parameters are drawn at random among those whose Fisher value is
  not 0, and their :math:`H_{ii} = e_i^\top H e_i` is computed exactly, by differentiating :math:`\partial L / \partial
  \theta_i` once more. Hutchinson's estimate cannot decide this: the error of one of its elements is of the size of the
  row beside the diagonal, :math:`\sqrt{\sum_{j \neq i} H_{ij}^2}`, and drowns it for thousands of vectors.
- *Tensors' means*, which the schedule depends on: :math:`\operatorname{diag} H \approx \frac1M \sum_v v \odot H v`
  with M Rademacher vectors v (Hutchinson; Bekas et al., 2007; PyHessian, Yao et al., 2020), averaged over each tensor.
  The Monte Carlo error is shown by two independent halves of the vectors: with r the rank correlation between their
  estimates, no comparison with a perfect Hessian can be expected to show more than about
  :math:`\sqrt{2 r / (1 + r)}` (the reliability of the whole after Spearman and Brown).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from guided_dropout import estimate_fisher
from guided_dropout.artefacts import write_json
from guided_dropout.cli.console import progress_bar
from guided_dropout.cli.inputs import open_text
from guided_dropout.detection import detect_objective
from guided_dropout.inputs import text_inputs
from guided_dropout.models import load_lm, load_tokenizer
from guided_dropout.objectives import Objective, Sample
from guided_dropout.provenance import provenance
from guided_dropout.schedule.kinds import tensor_places
from guided_dropout.undisturbed import evaluating

Place = tuple[str, str]
"""Layer and kind of a tensor."""
BATCH = 16


def hutchinson(
    model: nn.Module,
    objective: Objective,
    samples: Sequence[Sample],
    *,
    vectors: int,
    seed: int,
    batch_size: int = BATCH,
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


def exact_elements(
    model: nn.Module,
    objective: Objective,
    samples: Sequence[Sample],
    chosen: Mapping[str, Sequence[int]],
    *,
    batch_size: int = BATCH,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, np.ndarray]:
    """Diagonal elements of the Hessian, for each parameter at the (flat) places chosen: name → [n] float64.

    The attention must be one that can be differentiated twice: ``attn_implementation="eager"``.
    """
    found = {name: np.zeros(len(places)) for name, places in chosen.items()}
    with evaluating(model):
        parameters = {n: p for n, p in model.named_parameters() if n in chosen}
        for p in parameters.values():
            p.requires_grad_(True)
        done = 0
        for start in range(0, len(samples), batch_size):
            batch = objective.collate(model, samples[start : start + batch_size])
            loss = objective.losses(model(**batch.inputs).logits, batch).sum() / len(samples)
            gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
            for (name, p), gradient in zip(parameters.items(), gradients, strict=True):
                for k, place in enumerate(chosen[name]):
                    (row,) = torch.autograd.grad(gradient.flatten()[place], p, retain_graph=True, allow_unused=True)  # pyright: ignore
                    found[name][k] += 0.0 if row is None else row.flatten()[place].item()
                    progress(done := done + 1)
    return found


def draw(fisher: Mapping[str, Tensor], noise: Sequence[str], number: int, seed: int) -> dict[Place, dict[str, Any]]:
    """For each layer and kind, `number` parameters whose Fisher value is not 0: name → sorted flat places."""
    rng = np.random.default_rng(seed)
    drawn: dict[Place, dict[str, Any]] = {}
    for place, names in _groups(fisher, noise).items():
        known = [np.flatnonzero(fisher[n].flatten().numpy() > 0) for n in names]
        ends = np.cumsum([len(k) for k in known])
        if not ends[-1]:
            continue
        picks = np.sort(rng.choice(ends[-1], size=min(number, ends[-1]), replace=False))
        of = np.searchsorted(ends, picks, side="right")
        drawn[place] = {
            n: known[i][picks[of == i] - (ends[i - 1] if i else 0)] for i, n in enumerate(names) if (of == i).any()
        }
    return drawn


def compare_elements(
    fisher: Mapping[str, Tensor],
    hessian: Mapping[str, np.ndarray],
    drawn: Mapping[Place, Mapping[str, Any]],
    seed: int = 0,
) -> list[dict[str, Any]]:
    """For each layer and kind: the rank correlation over the parameters drawn, with a 95 % bootstrap interval."""
    rng, rows = np.random.default_rng(seed), []
    for (layer, kind), members in drawn.items():
        f = np.concatenate([fisher[n].double().flatten().numpy()[places] for n, places in members.items()])
        h = np.concatenate([hessian[n] for n in members])
        again = [_rank_correlation(f[i], h[i]) for i in rng.integers(len(f), size=(1000, len(f)))]
        low, high = np.nanquantile(again, [0.025, 0.975])
        rows.append(
            {
                "layer": layer,
                "kind": kind,
                "parameters": len(f),
                "spearman": _rank_correlation(f, h),
                "interval": [float(low), float(high)],
                "negative": float((h < 0).mean()),
            }
        )
    return rows


def compare_means(
    fisher: Mapping[str, Tensor], halves: Sequence[Mapping[str, Tensor]], noise: Sequence[str]
) -> dict[str, Any]:
    """The rank correlation of the tensors' means of a Fisher with two independent estimates of the Hessian's."""
    names = [n for n in fisher if n not in noise]
    f, a, b = (np.array([x[n].double().mean().item() for n in names]) for x in (fisher, *halves))
    r = _rank_correlation(a, b)
    return {
        "tensors": len(names),
        "spearman": _rank_correlation(f, (a + b) / 2),
        "between_halves": r,
        "ceiling": float(np.sqrt(2 * r / (1 + r))) if r > 0 else None,
        "negative": int((a + b < 0).sum()),
    }


def _groups(fisher: Mapping[str, Tensor], noise: Sequence[str]) -> dict[Place, list[str]]:
    places = tensor_places({n: tuple(t.shape) for n, t in fisher.items()})
    groups: dict[Place, list[str]] = {}
    for name in (n for n in fisher if n not in noise):
        layer = {None: "after", -1: "before"}.get(places[name].layer, str(places[name].layer))
        groups.setdefault((layer, places[name].kind), []).append(name)
    return groups


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    result: Any = spearmanr(a, b)
    return float(result.statistic)


def main() -> None:
    """One model, one text, one JSON file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--elements", type=int, default=100, help="parameters of each layer and kind")
    parser.add_argument("--kinds", nargs="+", metavar="KIND", help="of the tensors to draw from; default: all")
    parser.add_argument("--layers", nargs="+", metavar="LAYER", help="likewise: before, 0, 1, …, after")
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
    drawn_places = {
        (layer, kind): members
        for (layer, kind), members in draw(profile.diagonal, profile.noise, given.elements, given.seed).items()
        if (given.kinds is None or kind in given.kinds) and (given.layers is None or layer in given.layers)
    }
    if not drawn_places:
        parser.error(f"no parameters of kinds {given.kinds} in layers {given.layers}")
    chosen = {n: places for members in drawn_places.values() for n, places in members.items()}
    with progress_bar("elements and vectors", None) as update:
        steps = sum(map(len, chosen.values())) * -(-len(samples) // BATCH)
        total = steps + 2 * (given.vectors // 2)
        hessian = exact_elements(
            model, objective, samples, chosen, batch_size=BATCH, progress=lambda done: update(done, total)
        )
        halves = [{n: torch.zeros_like(p) for n, p in model.named_parameters()} for _ in range(2)]
        products = hutchinson(model, objective, samples, vectors=2 * (given.vectors // 2), seed=given.seed)
        for number, product in enumerate(products):
            for name, values in product.items():
                halves[number % 2][name] += values / (given.vectors // 2)
            update(steps + number + 1, total)
    rows = compare_elements(profile.diagonal, hessian, drawn_places)
    means = compare_means(profile.diagonal, halves, profile.noise)
    facts = provenance(model=profile.model, vectors=2 * (given.vectors // 2), num_samples=len(samples), **drawn.facts)
    write_json(
        given.out,
        {"kind": "fisher-against-hessian", "schema": 2, "by_layer": rows, "tensor_means": means, "provenance": facts},
    )
    for row in rows:
        print(row)
    print(means)


if __name__ == "__main__":
    main()
