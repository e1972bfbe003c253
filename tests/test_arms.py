"""Each arm by its name: chosen, checked, trained two steps in a paired run, and recorded."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_regularizers_pull import random_profile
from tiny import COLOUR, colour_examples, save_tiny_bert
from torch import nn

from guided_dropout import workbench as module
from guided_dropout.arms import ARMS, ChosenArm, choose_arm
from guided_dropout.errors import GuidedDropoutError, ScheduleError
from guided_dropout.finetune import RunResult, finetune
from guided_dropout.models import drawn_parameters, load_classifier, load_lm
from guided_dropout.regularizers import Context
from guided_dropout.schedule import DropoutSchedule
from guided_dropout.schedule.controls import role_mean, top_only

DATA = (colour_examples(32, seed=1), colour_examples(20, seed=2))
DECAY = 0.5
TWO_STEPS = {
    "data": DATA,
    "device": "cpu",
    "epochs": 1,
    "batch_size": 16,
    "learning_rate": 1e-3,
    "weight_decay": DECAY,
    "warmup_ratio": 0.0,
}
DOCS = Path(__file__).parents[1] / "docs" / "arms.md"


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="module")
def context(bert: Path) -> Context:
    model = load_lm(bert)
    profile = random_profile(model)
    schedule = DropoutSchedule.from_profile(profile, model, upper=0.3, lower=0.01)
    return Context(schedule=schedule, profile=profile)


def run(bert: Path, context: Context, arm: str, **options: Any) -> RunResult:
    return finetune(
        bert, COLOUR, arm=arm, schedule=context.schedule, profile=context.profile, **{**TWO_STEPS, **options}
    )


@pytest.fixture(scope="module")
def runs(bert: Path, context: Context) -> dict[str, RunResult]:
    return {arm: run(bert, context, arm) for arm in ARMS}


@pytest.mark.parametrize("arm", ARMS)
def test_it_trains_two_steps_paired_with_all_others(arm: str, runs: dict[str, RunResult], tmp_path: Path) -> None:
    result = runs[arm]
    assert result.pairing == runs["dropout"].pairing
    assert result.recipe == runs["dropout"].recipe
    assert not result.diverged
    assert result.arm == arm
    assert result.arm_parameters == ARMS[arm].parameters
    result.save(tmp_path / "run")
    assert RunResult.load(tmp_path / "run") == result


def test_each_arm_is_something_else(bert: Path, context: Context, runs: dict[str, RunResult]) -> None:
    # So soon after the start the usual pull is less than what a loss in single precision shows.
    strong = {arm: run(bert, context, f"{arm}:alpha=100") for arm in ("l2-sp", "guided-l2-sp")}
    decayed = {arm: run(bert, context, arm, weight_decay=100 * DECAY) for arm in ("dropout", "guided-decay")}
    assert decayed["dropout"].history != decayed["guided-decay"].history
    all_runs = {**{arm: r for arm, r in runs.items() if arm != "guided-decay"}, **strong}
    outcomes = {arm: (r.history[0]["train_loss"], r.history[0]["eval_loss"]) for arm, r in all_runs.items()}
    alike = [(a, b) for a, b in itertools.combinations(outcomes, 2) if outcomes[a] == outcomes[b]]
    assert not alike, outcomes


def test_a_run_that_changes_nothing_is_plain_dropout(bert: Path, context: Context, runs: dict[str, RunResult]) -> None:
    """With the parameters at which an arm does nothing, losses are the plain arm's to the last digit."""
    for arm, base in (
        *(("l2-sp:alpha=0,beta=0", "dropout"), ("ewc:strength=0", "dropout"), ("llrd:decay=1", "dropout")),
        *(("child-tuning:p=1", "dropout"), ("mixout:p=0", "none")),
    ):
        assert run(bert, context, arm).history == runs[base].history, arm


def test_rates_of_the_arms(runs: dict[str, RunResult], context: Context) -> None:
    mean = context.schedule.mean_rate
    spread = pytest.approx((0.01, mean, 0.3))
    guided = dict.fromkeys(("guided", "guided-gaussian", "reversed", "shuffled", "depth-linear", "magnitude"), spread)
    flat = {"uniform": (pytest.approx(mean),) * 3, **dict.fromkeys(("none", "mixout"), (0.0, 0.0, 0.0))}
    for name, control in (("role-mean", role_mean), ("top-only", top_only)):
        between = list(control(context.schedule).rates.values())
        flat[name] = pytest.approx((min(between), mean, max(between)))
    for arm, result in runs.items():
        found = tuple(result.rates[key] for key in ("min", "mean", "max"))
        assert found == {**guided, **flat}.get(arm, (pytest.approx(0.1),) * 3), arm


def test_evaluation_loss_is_the_plain_one(bert: Path, context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """A strong penalty is in the training loss, not in the evaluation's."""
    models: list[nn.Module] = []
    monkeypatch.setattr(module, "load_classifier", lambda *a, **k: models.append(load_classifier(*a, **k)) or models[0])
    result = run(bert, context, "l2-sp", arm_parameters={"alpha": 0, "beta": 1e4}, learning_rate=1e-9)
    assert result.history[0]["train_loss"] > 10
    assert result.history[0]["eval_loss"] < 2
    assert result.arm == "l2-sp:alpha=0,beta=10000"
    assert result.arm_parameters == {"alpha": 0.0, "beta": 1e4}


@pytest.mark.parametrize("arm", ["child-tuning", "surgical", "llrd", "guided-decay"])
def test_the_trainer_does_what_the_arm_says(
    arm: str, bert: Path, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[nn.Module] = []
    monkeypatch.setattr(module, "load_classifier", lambda *a, **k: models.append(load_classifier(*a, **k)) or models[0])
    groups: list[dict[str, Any]] = []
    step = torch.optim.AdamW.step

    def recorded(self: torch.optim.AdamW, *args: object, **options: object) -> object:
        groups[:] = self.param_groups
        return step(self, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    result = run(bert, context, arm)
    before = dict(load_classifier(bert, 2, head_seed=result.seeds.head).named_parameters())
    model = models[0]
    same = {n: (p.detach() == before[n]).double().mean().item() for n, p in model.named_parameters()}
    if arm == "surgical":
        trained = tuple(result.arm_facts["trained"])
        assert {n for n in same if same[n] < 1} == {
            n for n in same if n.startswith((*trained, "classifier", "bert.pooler"))
        }
    elif arm == "child-tuning":
        measured = [(p, before[n]) for n, p in model.named_parameters() if n in context.profile.diagonal]
        frozen = sum((p.detach() == start).sum().item() for p, start in measured)
        assert frozen >= result.arm_facts["measured"] - result.arm_facts["trained"]
        assert result.arm_facts["unmeasured"] == []
    elif arm == "llrd":
        initial = sorted({group["initial_lr"] for group in groups})
        assert initial == pytest.approx([1e-3 * 0.9**k for k in (3, 2, 1, 0)])
    else:
        decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
        assert len(decays) == len(before)
        assert decays[id(model.classifier.bias)] == decays[id(model.bert.embeddings.LayerNorm.weight)] == 0
        assert decays[id(model.classifier.weight)] == DECAY
        rate = context.schedule.rates["bert.encoder.layer.0.output.dropout"]
        wanted = DECAY * rate / context.schedule.mean_rate
        assert decays[id(model.bert.encoder.layer[0].output.dense.weight)] == pytest.approx(wanted)


def test_the_pooler_that_the_checkpoint_lacks_counts_as_new(bert: Path, runs: dict[str, RunResult]) -> None:
    drawn = {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert drawn_parameters(load_classifier(bert, 2, head_seed=0)) == drawn
    assert runs["l2-sp"].arm_facts["new"] == sorted(drawn)
    assert drawn_parameters(load_lm(bert)) is None


# --- choosing


@pytest.mark.parametrize(
    ("arm", "parameters", "label", "values"),
    [
        ("mixout", (), "mixout", {"p": 0.7}),
        ("mixout:p=0.7", (), "mixout", {"p": 0.7}),
        ("mixout:p=0.9", (), "mixout:p=0.9", {"p": 0.9}),
        ("mixout", ["p=0.9"], "mixout:p=0.9", {"p": 0.9}),
        ("mixout", {"p": 0.9}, "mixout:p=0.9", {"p": 0.9}),
        ("shuffled:seed=3", (), "shuffled:seed=3", {"seed": 3}),
        ("l2-sp:beta=1", {"alpha": 2}, "l2-sp:alpha=2,beta=1", {"alpha": 2.0, "beta": 1.0}),
        ("r-drop: alpha = 0.5", (), "r-drop:alpha=0.5", {"alpha": 0.5}),
        ("guided", (), "guided", {}),
        ("shuffled:seed=1234567", (), "shuffled:seed=1234567", {"seed": 1234567}),
        ("mixout:p=0.12345678", (), "mixout:p=0.12345678", {"p": 0.12345678}),
        ("ewc:strength=12345678", (), "ewc:strength=12345678.0", {"strength": 12345678.0}),
    ],
)
def test_an_arm_is_read_as_people_write_it(arm: str, parameters: Any, label: str, values: dict[str, float]) -> None:
    chosen = choose_arm(arm, parameters)
    assert (chosen.label, chosen.parameters) == (label, values)
    assert choose_arm(chosen.label) == chosen == ChosenArm(chosen.name, chosen.parameters)
    assert [type(v) for v in chosen.parameters.values()] == [type(v) for v in ARMS[chosen.name].parameters.values()]


@pytest.mark.parametrize(
    ("arm", "parameters", "error", "message"),
    [
        ("mixot", (), ScheduleError, r"unknown arm 'mixot' \(did you mean 'mixout'\?\)"),
        ("child_tuning", (), ScheduleError, "did you mean 'child-tuning'"),
        ("rdrop", (), ScheduleError, "did you mean 'r-drop'"),
        ("mixout:q=1", (), ScheduleError, "unknown parameter of the arm 'mixout' 'q'; expected one of: p"),
        ("guided:p=1", (), ScheduleError, "the arm 'guided' has no parameters; found 'p'"),
        ("mixout:p", (), ScheduleError, "arm parameter 'p'; expected name=value"),
        ("mixout:p=much", (), ScheduleError, "arm parameter p is 'much'; expected a number"),
        ("shuffled:seed=1.5", (), ScheduleError, "arm parameter seed is '1.5'; expected a whole number"),
        ("mixout:p=0.1", ["p=0.2"], ScheduleError, "the parameter 'p' of the arm 'mixout' twice"),
        ("shuffled:seed=-1", (), ScheduleError, "seed -1 of the control shuffled; expected a whole number from 0"),
        ("top-only:k=0", (), ScheduleError, "k 0 of the control top-only; expected at least 1"),
        ("mixout:p=2", (), GuidedDropoutError, "p is 2.0; expected a number from 0 to 1"),
        ("mixout", {"p": True}, ScheduleError, "p is True; expected a number"),
    ],
)
def test_a_wrong_arm_is_named(arm: str, parameters: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        choose_arm(arm, parameters)


def refusal(arm: ChosenArm, context: Context) -> str | None:
    try:
        arm.check(context)
    except ScheduleError as e:
        return str(e)
    return None


@pytest.mark.parametrize("arm", ARMS)
def test_what_an_arm_needs_is_asked_for_before_any_work(arm: str, context: Context) -> None:
    """It does without all that is not asked for: `runs` proves that with both it works."""
    chosen, needs = choose_arm(arm), []
    for what, command in (("schedule", "schedule"), ("profile", "fisher")):
        message = refusal(chosen, replace(context, **{what: None}))
        if message:
            assert message.startswith(f"the arm '{arm}' has no {what}; expected ")
            assert f"`guided-dropout {command}`" in message
            needs.append(what)
    guided = ("guided", "uniform", "top", "role", "reversed", "shuffled", "depth", "magnitude")
    assert needs == (
        ["schedule"] if arm.startswith(guided) else ["profile"] if arm in ("ewc", "child-tuning", "surgical") else []
    )


def test_a_missing_profile_stops_a_run_before_the_model_is_loaded(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "load_classifier", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(ScheduleError, match="the arm 'ewc' has no profile"):
        finetune(bert, COLOUR, arm="ewc", **TWO_STEPS)


def test_a_control_that_is_the_schedule_itself_is_refused(bert: Path, context: Context) -> None:
    message = r"the control top-only:k=7 is the schedule itself: the same rate at each of 7 sites.*or k below 6"
    with pytest.raises(ScheduleError, match=message):
        run(bert, context, "top-only:k=7")


def test_draws_of_the_shuffled_control_differ(context: Context, bert: Path) -> None:
    model = load_classifier(bert, 2, head_seed=0)
    draws = [choose_arm(f"shuffled:seed={seed}").rates(model, context).rates for seed in (0, 0, 1, 2)]
    assert draws[0] == draws[1]
    assert len({tuple(d.values()) for d in draws}) == 3
    assert {tuple(sorted(d.values())) for d in draws} == {tuple(sorted(context.schedule.rates.values()))}


def test_every_arm_is_in_the_documentation() -> None:
    table = DOCS.read_text()
    for arm in ARMS:
        assert f"| `{arm}` |" in table
