"""Samples, and a slow, obviously right Fisher to compare with."""

import copy

import torch
from transformers import PreTrainedModel


def draw_samples(lengths, *, seed=0, share=0.4, low=5, vocab=61):
    """One sample of each length; each has a target."""
    g = torch.Generator().manual_seed(seed)
    samples = []
    for n in lengths:
        ids = torch.randint(low, vocab, (n,), generator=g)
        labels = torch.where(torch.rand(n, generator=g) < share, ids, -100)
        labels[-1] = ids[-1]
        samples.append({"input_ids": ids, "labels": labels})
    return samples


def own_loss_oracle(model, samples):
    """The model's own loss, one sample after the other, plain autograd, in float64."""
    model = copy.deepcopy(model).double().eval()
    model.requires_grad_(True)
    if isinstance(model, PreTrainedModel):
        model.set_experts_implementation("eager")  # the grouped one takes no float64
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for s in samples:
        model.zero_grad()
        model(**{k: torch.as_tensor(v)[None] for k, v in s.items()}).loss.backward()
        for n, p in model.named_parameters():
            if p.grad is not None:
                total[n] += p.grad**2
    return {n: t / len(samples) for n, t in total.items()}


def assert_exact(found, expected, *, rtol=1e-6):
    """Per tensor, in the norm: up to the float32 of the profile, and to rounding noise where the truth is zero."""
    assert found.keys() == expected.keys()
    largest = max(t.norm() for t in expected.values())
    for name, want in expected.items():
        error = (found[name].double() - want.double()).norm()
        assert error <= rtol * want.norm() + 1e-14 * largest, f"{name}: {error:.2e} of {want.norm():.2e}"
