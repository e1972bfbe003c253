"""A device whose memory does not suffice says nothing of the model: it is told, and no shortcut is given up for it."""

import weakref

import pytest
import torch
from families import language_model
from fisher_oracles import assert_exact, draw_samples, own_loss_oracle
from test_fisher_narrow import Mixing, diagonal_of, squares_of
from torch.utils._python_dispatch import TorchDispatchMode

from guided_dropout.detection import detect_objective
from guided_dropout.fisher import plan
from guided_dropout.fisher.check import checked_plan
from guided_dropout.fisher.lengths import goes_by_longest
from guided_dropout.landscape.losses import Evaluation


class Full(TorchDispatchMode):
    """Memory is full at one of the operations, counted from 0."""

    def __init__(self, at=None):
        super().__init__()
        self.at, self.seen = at, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        if self.seen - 1 == self.at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["bert", "mamba"])
def test_a_plan_is_not_made_without_memory(family, monkeypatch):
    """Wherever it shows; mamba has operations without a rule."""
    monkeypatch.setattr(plan, "written_out", lambda _: {})  # which looks at modules on the CPU
    model, samples = language_model(family).requires_grad_(False), draw_samples([30, 29])
    objective, parameters = detect_objective(model, samples[0]), dict(model.named_parameters())
    with Full() as never:
        checked_plan(model, objective, parameters, samples)
    for part in range(24):
        with pytest.raises(torch.OutOfMemoryError), Full(never.seen * part // 24):
            checked_plan(model, objective, parameters, samples)


class FullForOne(TorchDispatchMode):
    """Memory is full when the operation first runs on one sample alone."""

    raised = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.atan2.default and len(args[0]) == 1 and not self.raised:
            self.raised = True
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return func(*args, **(kwargs or {}))


def test_an_operation_without_a_rule_is_not_given_up_without_memory():
    model, samples = Mixing(lambda m, x: torch.atan2(m.last(x), m.last.bias)), draw_samples([9, 9])
    objective, parameters = detect_objective(model, samples[0]), dict(model.requires_grad_(False).named_parameters())
    with pytest.raises(torch.OutOfMemoryError), FullForOne():
        checked_plan(model, objective, parameters, samples)


def test_no_look_at_padding_is_taken_without_memory():
    model, (sample,) = language_model("bert"), draw_samples([9])
    objective = detect_objective(model, sample)
    with pytest.raises(torch.OutOfMemoryError), Full(20):
        goes_by_longest(model, objective, sample)


def test_no_landscape_gives_up_its_head_without_memory(monkeypatch):
    model, samples = language_model("bert"), draw_samples([9, 5, 11], share=0.2)
    assert Evaluation(model, samples).head_at_targets

    head = model.get_output_embeddings()
    forward = head.forward

    def full(x):
        if x.dim() == 2:  # at the targets
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(x)

    monkeypatch.setattr(head, "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        Evaluation(model, samples)


def test_a_batch_that_does_not_fit_leaves_the_plan_as_it_is():
    model, samples = language_model("llama").double(), draw_samples([9, 5, 11, 7])
    squares = squares_of(model, samples)
    squares.totals.clear()
    made, norm = squares.plan, model.model.norm.forward
    assert made.late is not None
    assert made.start is not None

    def full(x):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    model.model.norm.forward = full
    with pytest.raises(torch.OutOfMemoryError):
        squares.add(samples)
    model.model.norm.forward = norm
    squares.add(samples)
    assert squares.plan is made
    assert_exact(diagonal_of(squares, 4), own_loss_oracle(model, samples))


def test_what_was_tried_in_vain_is_gone_when_it_is_tried_again():
    kept, mixes = [], []

    def end(m, x):
        if mixes:
            kept.append([ref() for ref in refs])
            refs.append(weakref.ref(y := m.last(x)))
            return y.view(-1, 11, 6)
        return m.last(x)

    refs, model, samples = [], Mixing(end).double(), draw_samples([11, 11, 11], share=0.5)
    squares = squares_of(model, samples)
    mixes.append(True)
    squares.add(samples)
    assert squares.plan.start is None
    assert kept == [[], [None]]
