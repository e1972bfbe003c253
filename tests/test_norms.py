"""Per-sample gradients of norms, against autograd in float64, one sample at a time."""

import os
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from guided_dropout.fisher.layout import Layout
from guided_dropout.fisher.rules import RULES


def of_samples(norm, x, g, layout, options):
    """Each sample's gradients of the weight and the bias [B, n]."""
    found = []
    for b in range(layout.num_samples):
        own = layout.row_numbers(torch.device("cpu"))[layout.offsets[b] : layout.offsets[b + 1]]
        weight, bias = (torch.zeros(x.shape[1], dtype=torch.float64).requires_grad_() for _ in range(2))
        out = norm(x[own].double(), (x.shape[1],), weight, **options)
        ((out + bias) * g[own].double()).sum().backward()
        found.append((weight.grad, bias.grad))
    return [torch.stack(part) for part in zip(*found, strict=True)]


@pytest.mark.parametrize("kernel", ["", "off"])
@pytest.mark.parametrize("norm", [F.layer_norm, F.rms_norm])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_sums_are_those_of_autograd(norm, kernel, data):
    draw = data.draw
    g = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    rows, samples = draw(st.sampled_from([0, 1, 7, 33, 100])), draw(st.integers(1, 4))
    width = draw(st.sampled_from([1, 5, 16, 63, 64, 65, 130, 384]))
    x = torch.randn(rows, width, generator=g) + draw(st.sampled_from([0, 3]))
    x = x * draw(st.sampled_from([1e-3, 1.0, 1e3]))
    gradient = torch.randn(rows, width + 3, generator=g)[:, 2 : width + 2]
    options = {} if draw(st.booleans()) else {"eps": draw(st.sampled_from([1e-12, 1e-3]))}
    layout = Layout.even(rows - rows % samples, samples)
    if draw(st.booleans()):  # some rows, in any order
        some = torch.randperm(rows, generator=g)[: rows // 2]
        layout = Layout.of_owners(torch.randint(0, samples, some.shape, generator=g), samples, some)
    if layout.step is not None:
        x, gradient = x[: layout.offsets[-1]], gradient[: layout.offsets[-1]]
    rule = RULES[norm]
    call = rule.bind(x, (width,), torch.ones(width), **options)
    with mock.patch.dict(os.environ, {"GUIDED_DROPOUT_KERNEL": kernel}):
        uses = rule.uses(call, gradient, layout)
    by_default = {"eps": torch.finfo(torch.float32).eps} if norm is F.rms_norm else {}
    want = of_samples(norm, x, gradient, layout, by_default | options)
    for role, wanted in zip(("weight", "bias"), want, strict=True):
        assert (uses[role].grads.double() - wanted).norm() <= 2e-6 * (wanted.norm() + gradient.norm())
