from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import classifier_of, profile_of
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from guided_dropout import DropoutSchedule, GuidedDropoutCallback, find_sites
from guided_dropout.errors import ScheduleError

DATA = [{"input_ids": [3 + i, 9, 2 * i + 4, 2], "labels": i % 2} for i in range(8)]


class Tracker(TrainerCallback):
    """Stands for TensorBoard and its like."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs=None, **_) -> None:
        self.logs.append(dict(logs))


def rates_of(model: PreTrainedModel) -> dict[str, float]:
    return {site.path: site.rate for site in find_sites(model)}


def schedule_for(model: PreTrainedModel, upper: float = 0.4) -> DropoutSchedule:
    return DropoutSchedule.from_profile(profile_of(model), model, upper=upper, lower=0.05)


def trainer_of(model: PreTrainedModel, folder: Path, *callbacks: TrainerCallback, steps: int = 4) -> Trainer:
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=2,
        logging_steps=1,
        per_device_train_batch_size=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    return Trainer(model, args, train_dataset=DATA, callbacks=[Tracker(), *callbacks])


def test_the_schedule_is_on_while_training_and_only_then(tmp_path: Path) -> None:
    model = classifier_of("bert")
    schedule, before, seen = schedule_for(model), rates_of(model), []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **_) -> None:
            seen.append(rates_of(model))

    callback = GuidedDropoutCallback(schedule)
    trainer = trainer_of(model, tmp_path, callback, Look())
    trainer.train()
    assert len(seen) == 4
    assert all({path: rates[path] for path in schedule.rates} == schedule.rates for rates in seen)
    assert rates_of(model) == before
    assert callback.handle is None
    for step in (2, 4):
        assert DropoutSchedule.load(tmp_path / f"checkpoint-{step}" / "schedule.json") == schedule


def test_training_is_that_of_a_model_with_these_rates(tmp_path: Path) -> None:
    guided, by_hand = classifier_of("bert"), classifier_of("bert")
    schedule = schedule_for(guided)
    trainer_of(guided, tmp_path / "a", GuidedDropoutCallback(schedule)).train()
    modules = dict(by_hand.named_modules())
    for path, rate in schedule.rates.items():
        modules[path].p = rate
    trainer_of(by_hand, tmp_path / "b").train()
    assert all(torch.equal(a, b) for a, b in zip(guided.parameters(), by_hand.parameters(), strict=True))


@pytest.mark.parametrize("given", [True, False], ids=["given", "from the checkpoint"])
def test_a_resumed_run_goes_on_with_the_same_schedule(tmp_path: Path, given: bool) -> None:
    whole = classifier_of("bert")
    schedule = schedule_for(whole)
    trainer_of(whole, tmp_path / "whole", GuidedDropoutCallback(schedule)).train()
    half = classifier_of("bert")
    trainer = trainer_of(half, tmp_path / "half", GuidedDropoutCallback(schedule if given else None))
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), half.parameters(), strict=True))
    assert DropoutSchedule.load(tmp_path / "half" / "checkpoint-4" / "schedule.json") == schedule
    assert sum("guided_dropout/mean_rate" in entry for entry in trainer.state.log_history) == 1


def test_a_checkpoint_of_another_schedule_is_refused(tmp_path: Path) -> None:
    model = classifier_of("bert")
    trainer_of(model, tmp_path, GuidedDropoutCallback(schedule_for(model)), steps=2).train()
    other, before = schedule_for(model, upper=0.3), rates_of(model)
    trainer = trainer_of(model, tmp_path, GuidedDropoutCallback(other))
    with pytest.raises(ScheduleError, match=rf"step 2 was trained with schedule \w+, the one given is {other.digest}"):
        trainer.train(resume_from_checkpoint=True)
    assert rates_of(model) == before


def test_a_trainer_that_restores_callbacks_is_refused(tmp_path: Path) -> None:
    """It would put one with the checkpoint's schedule in this one's place, whatever the schedule given."""
    model = classifier_of("bert")
    schedule = schedule_for(model)
    trainer_of(model, tmp_path, GuidedDropoutCallback(schedule), steps=2).train()
    before = rates_of(model)
    trainer = trainer_of(model, tmp_path, GuidedDropoutCallback(schedule))
    trainer.args.restore_callback_states_from_checkpoint = True
    with pytest.raises(ScheduleError, match="restore_callback_states_from_checkpoint is on"):
        trainer.train(resume_from_checkpoint=True)
    assert rates_of(model) == before


def test_a_checkpoint_without_a_schedule_is_refused(tmp_path: Path) -> None:
    model = classifier_of("bert")
    trainer_of(model, tmp_path, steps=2).train()
    with pytest.raises(ScheduleError, match="trained with no schedule"):
        trainer_of(model, tmp_path, GuidedDropoutCallback(schedule_for(model))).train(resume_from_checkpoint=True)
    with pytest.raises(ScheduleError, match="has no schedule"):
        trainer_of(model, tmp_path, GuidedDropoutCallback()).train(resume_from_checkpoint=True)


def test_two_of_them_on_one_trainer_are_refused(tmp_path: Path) -> None:
    model = classifier_of("bert")
    before, callbacks = rates_of(model), [GuidedDropoutCallback(schedule_for(model, upper)) for upper in (0.4, 0.3)]
    with pytest.raises(ScheduleError, match="holds several GuidedDropoutCallbacks"):
        trainer_of(model, tmp_path, *callbacks).train()
    assert rates_of(model) == before


def test_a_trial_of_a_search_writes_into_its_own_checkpoints_alone(tmp_path: Path, monkeypatch) -> None:
    first, second = (schedule_for(classifier_of("bert"), upper) for upper in (0.4, 0.3))
    trainer_of(classifier_of("bert"), tmp_path, GuidedDropoutCallback(first), steps=2).train()
    trainer = trainer_of(classifier_of("bert"), tmp_path, GuidedDropoutCallback(second), steps=2)
    monkeypatch.setattr(
        trainer, "_get_output_dir", lambda trial: str(tmp_path / "run-0")
    )  # as any search's backend has it
    trainer.train()
    assert DropoutSchedule.load(tmp_path / "checkpoint-2" / "schedule.json") == first
    assert DropoutSchedule.load(tmp_path / "run-0" / "checkpoint-2" / "schedule.json") == second


def test_what_is_no_schedule_is_refused_at_once() -> None:
    with pytest.raises(ScheduleError, match="GuidedDropoutCallback was given a dict for a schedule; expected"):
        GuidedDropoutCallback({"a": 0.1})


@pytest.mark.parametrize("to_trackers", [True, False])
def test_the_schedule_is_logged_once(tmp_path: Path, to_trackers: bool) -> None:
    model = classifier_of("bert")
    schedule = schedule_for(model)
    trainer = trainer_of(model, tmp_path)
    trainer.add_callback(GuidedDropoutCallback(schedule, trainer=trainer if to_trackers else None))
    trainer.train()
    history = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    (entry,) = [entry for entry in history if "guided_dropout/mean_rate" in entry]
    assert entry["guided_dropout/mean_rate"] == pytest.approx(schedule.mean_rate)
    assert {f"guided_dropout/rate/{path}": rate for path, rate in schedule.rates.items()}.items() <= entry.items()
    (tracker,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, Tracker)]
    assert sum("guided_dropout/mean_rate" in logs for logs in tracker.logs) == to_trackers


def test_after_an_error_the_rates_can_be_taken_off(tmp_path: Path) -> None:
    model = classifier_of("bert")
    before = rates_of(model)

    class Fail(TrainerCallback):
        def on_step_end(self, args, state, control, **_) -> None:
            raise KeyError

    callback = GuidedDropoutCallback(schedule_for(model).save(tmp_path / "given.json"))
    with pytest.raises(KeyError):
        trainer_of(model, tmp_path, callback, Fail()).train()
    callback.remove()
    assert rates_of(model) == before
