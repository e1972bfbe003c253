"""What all regularizers share: what they may draw on, how they go on a model, and how they come off again."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from guided_dropout.errors import GuidedDropoutError, ScheduleError
from guided_dropout.fisher.profile import FisherProfile
from guided_dropout.schedule import DropoutSchedule

_HOW = {
    "schedule": "expected one made from a Fisher profile: run `guided-dropout schedule` and give it",
    "profile": "expected the Fisher profile of the pretrained model: run `guided-dropout fisher` and give it",
}


@dataclass(frozen=True)
class Context:
    """What a regularizer may draw on, besides the model that it is put on.

    Attributes:
        rate: the plain dropout rate of the experiment, in [0, 1).
        schedule: a schedule for the model's backbone.
        profile: a profile of the model's backbone.
        new: names of the parameters that are not pretrained, as they are now or were before PEFT wrapped the model;
            None for adapters' and those outside of the backbone.
        inputs: keyword arguments of the model's forward, for regularizers that run it once; by default a tiny batch.
    """

    rate: float = 0.1
    schedule: DropoutSchedule | None = None
    profile: FisherProfile | None = None
    new: Collection[str] | None = None
    inputs: Mapping[str, Any] | None = None

    def check(self, who: str, needs: Collection[str]) -> None:
        """Make sure that what `who` needs is there.

        Raises:
            ScheduleError: it is not.
        """
        for what in needs:
            if getattr(self, what) is None:
                raise ScheduleError(f"{who} has no {what}; {_HOW[what]}")

    def needed_schedule(self, who: str) -> DropoutSchedule:
        """The schedule; an error where there is none."""
        self.check(who, ("schedule",))
        assert self.schedule is not None
        return self.schedule

    def needed_profile(self, who: str) -> FisherProfile:
        """The profile; an error where there is none."""
        self.check(who, ("profile",))
        assert self.profile is not None
        return self.profile


class Handle:
    """Takes a regularizer off a model again, by `remove` or at the end of a ``with`` block.

    The training loop asks it for the loss of each training batch and, once, for the optimizer's parameter groups; what
    a regularizer does inside of the model or to its gradients needs no help of the loop.

    Attributes:
        facts: what the regularizer found on this model, as plain data.
        active: whether it is still on the model.
        whole_batches: whether a batch must be one forward, since its examples share random numbers.
        again: how to get another one, for an error's message.
    """

    again: ClassVar[str] = "call the regularizer's apply again"

    def __init__(self, facts: Mapping[str, Any] | None = None):
        self.facts = dict(facts or {})
        self.active = True
        self.whole_batches = False
        self._undo = contextlib.ExitStack()

    def on_remove(self, undo: Callable[..., object], *args: Any) -> None:
        """Call ``undo(*args)`` when this is removed; what was added last is undone first."""
        self._undo.callback(undo, *args)

    def remove(self) -> None:
        """Take it off; a second call does nothing. Weights stay as training left them."""
        self.active = False
        self._undo.close()

    def loss(self, loss: Tensor, model: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> Tensor:
        """The loss to train on.

        Args:
            loss: of one batch of training examples, a scalar.
            model: in training mode.
            inputs: the batch.
            outputs: what the model made of it.
        """
        return self._loss(loss, model, inputs, outputs) if self.active else loss

    def parameter_groups(self, groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The optimizer's parameter groups in place of `groups`, which hold ``params``, ``lr`` and ``weight_decay``."""
        groups = [dict(group) for group in groups]
        return self._parameter_groups(groups) if self.active else groups

    def _loss(self, loss: Tensor, model: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> Tensor:
        return loss

    def _parameter_groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return groups

    def __enter__(self) -> Self:
        """Stay on the model for the time of a block.

        Raises:
            GuidedDropoutError: it is off already.
        """
        if not self.active:
            raise GuidedDropoutError(
                f"this {type(self).__name__.removeprefix('_')} has been removed, so that the block would run without "
                f"it; expected one that is still on its model: {self.again}"
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


@dataclass(frozen=True)
class Regularizer(ABC):
    """One idea of how to keep fine-tuning from overfitting; its fields are its parameters.

    Attributes:
        needs: what must stand in the `Context`: ``"schedule"``, ``"profile"``.
        holds_weights: whether it keeps, compares or groups the weights that embed tokens, so that they must stay the
            parameter that they were when it was put on.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    holds_weights: ClassVar[bool] = True

    @abstractmethod
    def apply(self, model: nn.Module, context: Context) -> Handle:
        """Put it on a model that has its pretrained weights; evaluation mode is the plain model all the same.

        Raises:
            ScheduleError: something that it needs is not in the context, or belongs to another model.
            ModelError: a model that it cannot do anything for.
            SiteError: it does not arrive where it should.
        """

    def parameters(self) -> dict[str, Any]:
        """Its parameters by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def check_number(name: str, value: Any, holds: bool, wanted: str) -> None:
    """Refuse a parameter that is out of range.

    Raises:
        GuidedDropoutError: it does not hold.
    """
    if not holds:
        raise GuidedDropoutError(f"{name} is {value}; expected {wanted}")


def itself(parameter: Any) -> nn.Parameter:
    """A parameter of an optimizer's group, which may hold ``(name, parameter)``, as from ``named_parameters()``."""
    return parameter[1] if isinstance(parameter, tuple) else parameter


def check_known(groups: Sequence[Mapping[str, Any]], known: Mapping[int, Any], what: str) -> None:
    """Refuse parameter groups of another model, on which `what` would do nothing.

    Args:
        groups: of the optimizer.
        known: `id` of each parameter of the model.
        what: it acts on the groups.

    Raises:
        GuidedDropoutError: no parameter is of the model.
    """
    held = [itself(parameter) for group in groups for parameter in group["params"]]
    if held and not any(id(parameter) in known for parameter in held):
        raise GuidedDropoutError(
            f"none of the {len(held)} parameters in these groups is of the model that {what} was put on; expected that "
            "model's own: make the groups from it, after the regularizer was applied"
        )
