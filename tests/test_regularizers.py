"""What holds for each regularizer: evaluation is the plain model, and `remove` leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import classifier_of, language_model, profile_of
from torch import nn
from torch.optim import optimizer
from transformers import PreTrainedModel

from guided_dropout.errors import GuidedDropoutError, ModelError, ScheduleError
from guided_dropout.regularizers import (
    EWC,
    L2SP,
    ChildTuning,
    Context,
    GaussianDropout,
    GuidedDecay,
    GuidedL2SP,
    LayerwiseDecay,
    Mixout,
    RDrop,
    Regularizer,
    Surgical,
)
from guided_dropout.schedule import DropoutSchedule

ALL = [
    *(EWC(), L2SP(), ChildTuning(), GaussianDropout(), GuidedDecay(), GuidedL2SP(), LayerwiseDecay(), Mixout()),
    *(RDrop(), Surgical()),
]
SOME_FAMILIES = ["bert", "albert", "deberta-v2", "gpt2", "opt", "llama", "t5", "bart"]
each_regularizer = pytest.mark.parametrize("regularizer", ALL, ids=lambda r: type(r).__name__)


def context_of(family: str) -> Context:
    model = language_model(family)
    profile = profile_of(model)
    return Context(schedule=DropoutSchedule.from_profile(profile, model), profile=profile)


def logits(model: PreTrainedModel) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 6, 7, 8, 9, 2], [7, 6, 5, 9, 8, 2]])).logits


def traces(model: nn.Module) -> dict[str, Any]:
    """Everything that a regularizer might change, in a form that can be compared."""
    return {
        "weights": {n: p.detach().clone() for n, p in model.state_dict().items()},
        "parameters": {n: (id(p), p.requires_grad, len(p._backward_hooks or {})) for n, p in model.named_parameters()},
        "modules": {
            n: (
                id(m),
                m.training,
                sorted(vars(m)),
                len(m._forward_hooks),
                len(m._forward_pre_hooks),
                str(m.extra_repr()),
            )
            for n, m in model.named_modules()
        },
        "optimizers": len(optimizer._global_optimizer_post_hooks),
        "random": torch.get_rng_state(),
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert torch.equal(found.pop("random"), expected.pop("random"))
    weights = found.pop("weights")
    assert all(torch.equal(weights[n], w) for n, w in expected.pop("weights").items())
    assert found == expected


@each_regularizer
@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_evaluation_is_the_plain_model_and_removal_leaves_no_trace(regularizer: Regularizer, family: str) -> None:
    model, context = classifier_of(family), context_of(family)
    plain, trained = logits(model.eval()), logits(model.train())
    torch.manual_seed(5)
    before = traces(model)
    handle = regularizer.apply(model, context)
    assert torch.equal(torch.get_rng_state(), before["random"])
    assert all(module.training for module in model.modules())
    assert torch.equal(logits(model.eval()), plain)
    model.train()
    handle.remove()
    handle.remove()
    torch.manual_seed(5)
    assert_same(traces(model), before)
    assert torch.equal(logits(model), trained)
    loss = torch.tensor(2.0)
    groups = [{"params": [p], "lr": 1.0, "weight_decay": 0.1} for p in model.parameters()]
    assert handle.loss(loss, model, {}, None) is loss
    assert handle.parameter_groups(groups) == groups


@each_regularizer
def test_it_comes_off_when_the_body_raises(regularizer: Regularizer) -> None:
    model = classifier_of("bert").train()
    torch.manual_seed(5)
    before = traces(model)
    with pytest.raises(KeyError), regularizer.apply(model, context_of("bert")):
        raise KeyError
    assert_same(traces(model), before)


@each_regularizer
def test_one_that_was_removed_does_not_pass_for_one_that_is_on(regularizer: Regularizer) -> None:
    model = classifier_of("bert").train()
    with regularizer.apply(model, context_of("bert")) as handle:
        pass
    with pytest.raises(GuidedDropoutError, match=r"has been removed, .*: call the regularizer's apply again"), handle:
        pass


@each_regularizer
def test_one_after_another_and_inside_out(regularizer: Regularizer) -> None:
    """Two regularizers on one model do not disturb each other's removal, in either order."""
    model, context = classifier_of("bert").train(), context_of("bert")
    torch.manual_seed(5)
    before = traces(model)
    for outer, inner in ((regularizer, Mixout(0.5)), (Mixout(0.5), regularizer)):
        with outer.apply(model, context), inner.apply(model, context):
            pass
        assert_same(traces(model), dict(before))


@pytest.mark.parametrize("regularizer", [r for r in ALL if r.needs], ids=lambda r: type(r).__name__)
def test_what_is_missing_is_named(regularizer: Regularizer) -> None:
    (what,) = regularizer.needs
    command = {"profile": "fisher", "schedule": "schedule"}[what]
    with pytest.raises(ScheduleError, match=f"has no {what}; expected .*run `guided-dropout {command}`"):
        regularizer.apply(classifier_of("bert"), Context())


@pytest.mark.parametrize("regularizer", [EWC(), ChildTuning(), Surgical()], ids=lambda r: type(r).__name__)
def test_a_profile_of_another_model_is_refused(regularizer: Regularizer) -> None:
    model = classifier_of("bert")
    before = traces(model)
    for other, difference in (
        (language_model("roberta"), "its model type is 'roberta'"),
        (language_model("bert", hidden_size=24), r"is \[64, 24\] in the profile, \[64, 16\] in the model"),
        (
            language_model("bert", num_hidden_layers=3),
            "it holds encoder.layer.2.*BertForSequenceClassification does not",
        ),
        (language_model("bert", num_hidden_layers=1), r"it does not hold encoder\.layer\.1"),
    ):
        with pytest.raises(ScheduleError, match=f"a profile of another model: .*{difference}"):
            regularizer.apply(model, Context(profile=profile_of(other)))
    assert_same(traces(model), before)


@pytest.mark.parametrize("regularizer", [EWC(), L2SP(), Mixout(), ChildTuning()], ids=lambda r: type(r).__name__)
def test_a_model_without_pretrained_weights_is_refused(regularizer: Regularizer) -> None:
    model = classifier_of("bert")
    context = Context(profile=profile_of(language_model("bert")), new=[n for n, _ in model.named_parameters()])
    with pytest.raises(ModelError, match="no trainable parameter with pretrained weights"):
        regularizer.apply(model, context)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Mixout, {"p": 1.1}, "p is 1.1; expected a number from 0 to 1"),
        (Mixout, {"p": float("nan")}, "p is nan"),
        (L2SP, {"alpha": -1.0}, "alpha is -1.0; expected at least 0"),
        (GuidedL2SP, {"beta": float("inf")}, "beta is inf"),
        (EWC, {"strength": -0.1}, "strength is -0.1"),
        (ChildTuning, {"p": 0.0}, "p is 0.0; expected a number above 0"),
        (Surgical, {"share": 1.5}, "share is 1.5"),
        (RDrop, {"alpha": -1.0}, "alpha is -1.0"),
        (LayerwiseDecay, {"decay": 0.0}, "decay is 0.0"),
    ],
)
def test_a_parameter_out_of_range_is_refused(kind: type[Regularizer], options: dict[str, float], message: str) -> None:
    with pytest.raises(GuidedDropoutError, match=message):
        kind(**options)
