"""A schedule on the transformers Trainer: on when training begins, in each checkpoint, off when training ends."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from guided_dropout.errors import ScheduleError
from guided_dropout.regularizers import DropoutHandle, apply_dropout
from guided_dropout.regularizers.rates import as_schedule
from guided_dropout.schedule import DropoutSchedule
from guided_dropout.schedule.files import arguments_of, facts_of

SCHEDULE_FILE = "schedule.json"
_NAME = "guided_dropout"


class GuidedDropoutCallback(TrainerCallback, ExportableState):
    """Trains with a schedule's rates, and lets each checkpoint say which they were.

    The schedule is put on the model when training begins and taken off when it ends. Each checkpoint folder gets it as
    ``schedule.json``, and the Trainer's state keeps it; a run that goes on from a checkpoint must have the same one, or
    is given none and takes it from there. The rates are logged once, as ``guided_dropout/…``, into the state's history,
    and with `trainer` to whatever tracker is on.

    Attributes:
        schedule: the schedule; None until a checkpoint has given it.
        handle: of the schedule on the model; None while it is not on.
    """

    def __init__(
        self,
        schedule: DropoutSchedule | str | Path | None = None,
        *,
        trainer: Trainer | None = None,
        inputs: Mapping[str, Any] | None = None,
    ):
        """Make the callback; nothing happens to a model yet.

        Args:
            schedule: the schedule or its file; None to go on with the one of the checkpoint that is resumed from.
            trainer: the Trainer that the callback is added to, whose trackers the schedule is logged to.
            inputs: keyword arguments of the model's forward, for `apply_dropout`'s proof.

        Raises:
            ArtefactError: the file is no schedule.
            ScheduleError: neither a schedule nor a file.
        """
        self.schedule = None if schedule is None else as_schedule(schedule, type(self).__name__)
        self.handle: DropoutHandle | None = None
        self._trainer = trainer
        self._inputs = inputs

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Put the schedule on the model.

        Raises:
            ScheduleError: no schedule, another than that of the checkpoint, one for another model, a second callback of
                this kind, or a Trainer that restores callbacks from the checkpoint, this one too.
            SiteError: a rate does not arrive.
        """
        assert model is not None
        self.remove()
        if isinstance(cast("dict[str, Any]", state.stateful_callbacks).get(type(self).__name__), list):
            raise ScheduleError(
                f"the Trainer's state holds several {type(self).__name__}s, whose schedules cannot be told apart in a "
                "checkpoint; expected one: remove the others"
            )
        if state.global_step > 0:
            if args.restore_callback_states_from_checkpoint:  # the Trainer has put another callback in this one's place
                raise ScheduleError(
                    "restore_callback_states_from_checkpoint is on, which replaces GuidedDropoutCallback and the "
                    "schedule that it was given; expected it off: the callback takes the checkpoint's schedule, or "
                    "makes sure that it is the one given, without it"
                )
            self._go_on(state)
        if self.schedule is None:
            raise ScheduleError(
                "GuidedDropoutCallback has no schedule; expected one, or a checkpoint that holds one: give a schedule"
            )
        self.handle = apply_dropout(model, self.schedule, self._inputs)
        self._log(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the schedule into the checkpoint's folder.

        Raises:
            ArtefactError: it cannot be written.
        """
        if state.is_world_process_zero and self.schedule is not None:
            for folder in _checkpoints(args, state):
                self.schedule.save(folder / SCHEDULE_FILE)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take the schedule off."""
        self.remove()

    def remove(self) -> None:
        """Take the schedule off, as after training that an error ended; a second call does nothing."""
        if self.handle is not None:
            self.handle.remove()
            self.handle = None

    def state(self) -> dict[str, Any]:
        """What the Trainer's state keeps in each checkpoint: the schedule."""
        return {"args": {}, "attributes": {"kept": facts_of(self.schedule) if self.schedule else None}}

    def _go_on(self, state: TrainerState) -> None:
        """Take the checkpoint's schedule, or make sure that it is the one given."""
        stateful: Any = state.stateful_callbacks
        exported = stateful.get(type(self).__name__)
        kept = exported["attributes"]["kept"] if isinstance(exported, dict) else None
        before = DropoutSchedule(**arguments_of(kept, "the checkpoint's state")) if kept else None
        if self.schedule is None:
            self.schedule = before
        elif before is None or before.digest != self.schedule.digest:
            raise ScheduleError(
                f"the checkpoint at step {state.global_step} was trained with "
                f"{f'schedule {before.digest}' if before else 'no schedule'}, the one given is {self.schedule.digest}; "
                f"expected the same: give the checkpoint's {SCHEDULE_FILE} or none, or begin anew"
            )

    def _log(self, state: TrainerState) -> None:
        assert self.schedule is not None
        mean = f"{_NAME}/mean_rate"
        if any(mean in entry for entry in state.log_history):
            return
        facts: dict[str, Any] = {mean: self.schedule.mean_rate}
        facts |= {f"{_NAME}/rate/{path}": rate for path, rate in self.schedule.rates.items()}
        if self._trainer is not None:
            self._trainer.log(facts)
        else:
            state.log_history.append({**facts, "step": state.global_step})


def _checkpoints(args: TrainingArguments, state: TrainerState) -> list[Path]:
    """The folder that the Trainer has just written; a hyperparameter search has one below, for its trial."""
    written = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}/{TRAINER_STATE_NAME}"
    here = Path(str(args.output_dir))
    # Others are an earlier run's. A folder that is written to again may keep its own time.
    states = sorted([*here.glob(written), *here.glob(f"*/{written}")], key=lambda path: path.stat().st_mtime_ns)
    return [path.parent for path in states[-1:]]
