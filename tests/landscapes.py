"""Made-up landscapes, a bowl for each mask, a little different for each seed; and a made-up profile."""

from dataclasses import replace

import numpy as np
import torch
from families import profile_of

from guided_dropout.landscape import Landscape, Mask
from guided_dropout.landscape.grid import Grid


def bowl(curvatures, *, dims=2, points=9, seeds=5, lengths=1.0, origin=4.0):
    grid = Grid(dims, points, 1.0)
    rng = np.random.default_rng(0)
    squares = (grid.coordinates**2).sum(1)
    factors = {name: c * (1 + 0.05 * rng.standard_normal(seeds)) for name, c in curvatures.items()}
    losses = np.empty((len(curvatures), seeds, len(squares)))
    for i, own in enumerate(factors.values()):
        with np.errstate(invalid="ignore"):
            losses[i] = origin + np.where(squares > 0, own[:, None] / 2 * squares, 0)
    return Landscape(
        losses=losses,
        lengths=np.full((len(curvatures), seeds, dims), lengths),
        moved=np.full((len(curvatures), seeds), 100),
        masks=tuple(map(Mask.parse, curvatures)),
        seeds=tuple(range(seeds)),
        grid=grid,
        directions={"kind": "gaussian", "normalise": "filter", "vectors": "held", "mask_level": "parameter"},
        objective="mlm",
        reduction="mean",
        num_samples=8,
        model={"architecture": "Toy", "name_or_path": "someone/toy"},
        provenance={"text": "t.txt"},
    )


def drawn_profile(model, *, noise=()):
    """Values that all differ, so that no tie decides a half."""
    generator = torch.Generator().manual_seed(0)
    diagonal = {n: torch.rand(p.shape, generator=generator) ** 3 for n, p in model.named_parameters()}
    means = {n: t.double().mean().item() for n, t in diagonal.items()}
    return replace(profile_of(model), diagonal=diagonal, tensor_means=means, shapes={}, noise=noise)
