"""The arms of an experiment: which dropout rates, and which regularizer beside them, by name and parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn

from guided_dropout.errors import ScheduleError, unknown
from guided_dropout.regularizers import (
    EWC,
    L2SP,
    ChildTuning,
    Context,
    GaussianDropout,
    GuidedDecay,
    GuidedL2SP,
    Handle,
    LayerwiseDecay,
    Mixout,
    RDrop,
    Regularizer,
    Surgical,
)
from guided_dropout.schedule import DropoutSchedule, controls


@dataclass(frozen=True)
class Arm:
    """One way to fine-tune.

    Attributes:
        summary: what it does, in a line.
        rates: (model, context, and its own parameters by name) → the rates of the backbone's sites.
        regularizer: what it adds to dropout; its fields are parameters of the arm too.
        needs: what `rates` must find in the context.
        check: refuses values of the parameters of `rates`, which it is given by name.
    """

    summary: str
    rates: Callable[..., DropoutSchedule]
    regularizer: type[Regularizer] | None = None
    needs: tuple[str, ...] = ()
    check: Callable[..., None] = lambda: None

    @property
    def of_rates(self) -> dict[str, Any]:
        """Name of each parameter of `rates` → its default."""
        own = inspect.signature(self.rates).parameters.values()
        return {p.name: p.default for p in own if p.kind is p.KEYWORD_ONLY}

    @property
    def parameters(self) -> dict[str, Any]:
        """Name of each parameter → its default."""
        return self.of_rates | {f.name: f.default for f in (fields(self.regularizer) if self.regularizer else ())}

    @property
    def uses(self) -> tuple[str, ...]:
        """What it draws on in the context, its regularizer included: ``"schedule"``, ``"profile"``."""
        return (*self.needs, *(self.regularizer.needs if self.regularizer else ()))


def _none(model: nn.Module, context: Context) -> DropoutSchedule:
    return DropoutSchedule.uniform(model, 0.0, inputs=context.inputs)


def _plain(model: nn.Module, context: Context) -> DropoutSchedule:
    return DropoutSchedule.uniform(model, context.rate, inputs=context.inputs)


def _guided(model: nn.Module, context: Context) -> DropoutSchedule:
    return context.needed_schedule("guided dropout")


def _shuffled(model: nn.Module, context: Context, *, seed: int = 0) -> DropoutSchedule:
    return controls.shuffled(_guided(model, context), seed)


def _top_only(model: nn.Module, context: Context, *, k: int = 1) -> DropoutSchedule:
    return controls.top_only(_guided(model, context), k)


def _control(function: Callable[[DropoutSchedule], DropoutSchedule]) -> Callable[..., DropoutSchedule]:
    return lambda model, context: function(_guided(model, context))


_SCHEDULE = ("schedule",)
ARMS = {
    "none": Arm("no dropout", _none),
    "dropout": Arm("plain dropout, the same rate at each site", _plain),
    "gaussian": Arm("Gaussian noise instead of masks, the same rate at each site", _plain, GaussianDropout),
    "guided": Arm("the schedule's rates: vital layers are dropped less", _guided, needs=_SCHEDULE),
    "guided-gaussian": Arm("Gaussian noise at the schedule's rates", _guided, GaussianDropout, _SCHEDULE),
    "uniform": Arm("control: the schedule's mean rate at each site", _control(controls.uniform), needs=_SCHEDULE),
    "top-only": Arm(
        "control: the most vital site alone keeps its rate", _top_only, needs=_SCHEDULE, check=controls.check_top
    ),
    "role-mean": Arm(
        "control: each kind of site has its mean rate in all layers", _control(controls.role_mean), needs=_SCHEDULE
    ),
    "reversed": Arm("control: the schedule's rates the wrong way round", _control(controls.reversed), needs=_SCHEDULE),
    "shuffled": Arm(
        "control: the schedule's rates dealt out by chance", _shuffled, needs=_SCHEDULE, check=controls.check_seed
    ),
    "depth-linear": Arm(
        "control: rates that rise with depth, without Fisher", _control(controls.depth_linear), needs=_SCHEDULE
    ),
    "magnitude": Arm(
        "control: ranked by the size of the weights, not by Fisher",
        lambda model, context: controls.magnitude(_guided(model, context), model, inputs=context.inputs),
        needs=_SCHEDULE,
    ),
    "guided-decay": Arm("weight decay spread like the schedule's rates", _plain, GuidedDecay),
    "l2-sp": Arm("L2 towards the pretrained weights", _plain, L2SP),
    "guided-l2-sp": Arm("L2-SP, vital layers are held less", _plain, GuidedL2SP),
    "ewc": Arm("weights held by their Fisher information", _plain, EWC),
    "mixout": Arm("no dropout; weights swapped for pretrained ones", _none, Mixout),
    "child-tuning": Arm("only the weights with most Fisher train", _plain, ChildTuning),
    "surgical": Arm("only the layers with most Fisher train", _plain, Surgical),
    "r-drop": Arm("two draws of dropout must agree", _plain, RDrop),
    "llrd": Arm("the learning rate falls towards the input", _plain, LayerwiseDecay),
}
"""Arm by name. Where the backbone's dropout is not what an arm is about, it has the plain rate at each site."""


@dataclass(frozen=True)
class ChosenArm:
    """An arm with its parameters.

    Attributes:
        name: a key of `ARMS`.
        parameters: all of its parameters by name.
    """

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Name, and the parameters that differ from their defaults: ``"mixout:p=0.9"``."""
        defaults = ARMS[self.name].parameters
        changed = [f"{name}={_shown(value)}" for name, value in self.parameters.items() if value != defaults[name]]
        return f"{self.name}:{','.join(changed)}" if changed else self.name

    def check(self, context: Context) -> None:
        """Make sure that the context holds what the arm needs, before any work.

        Raises:
            ScheduleError: it does not.
        """
        context.check(f"the arm {self.name!r}", ARMS[self.name].uses)

    def rates(self, model: nn.Module, context: Context) -> DropoutSchedule:
        """The dropout rates that it trains with.

        Raises:
            ScheduleError: a schedule that is missing or of another model.
        """
        return ARMS[self.name].rates(model, context, **self._of_rates())

    def check_apart(self, rates: DropoutSchedule, context: Context) -> None:
        """Refuse a control that is the schedule itself.

        Args:
            rates: what `rates` gave.
            context: likewise.

        Raises:
            ScheduleError: it is.
        """
        if self.name.replace("-", "_") in controls.CONTROLS:
            controls.check_apart(self.label, rates, context.needed_schedule(f"the control {self.label}"))

    def apply(self, model: nn.Module, context: Context) -> Handle:
        """Put on what it adds to dropout, once its rates are on; see `Regularizer.apply`."""
        return self.regularizer.apply(model, context) if self.regularizer else Handle()

    @property
    def holds_weights(self) -> bool:
        """Whether what it adds to dropout goes by the token table; see `Regularizer.holds_weights`."""
        return self.regularizer is not None and self.regularizer.holds_weights

    def _of_rates(self) -> dict[str, Any]:
        return {name: self.parameters[name] for name in ARMS[self.name].of_rates}

    @property
    def regularizer(self) -> Regularizer | None:
        """What it adds to dropout."""
        kind = ARMS[self.name].regularizer
        own = {f.name for f in fields(kind)} if kind else ()
        return kind(**{n: v for n, v in self.parameters.items() if n in own}) if kind else None

    def __post_init__(self) -> None:
        if self.name not in ARMS:
            raise ScheduleError(unknown("arm", self.name, ARMS))
        defaults = ARMS[self.name].parameters
        for name in self.parameters:
            if name not in defaults:
                raise ScheduleError(
                    unknown(f"parameter of the arm {self.name!r}", name, defaults)
                    if defaults
                    else f"the arm {self.name!r} has no parameters; found {name!r}: leave it out"
                )
        values = {
            name: _number(name, self.parameters.get(name, default), default) for name, default in defaults.items()
        }
        object.__setattr__(self, "parameters", values)
        _ = self.regularizer  # refuses values out of range
        ARMS[self.name].check(**self._of_rates())


def choose_arm(arm: str, parameters: Mapping[str, Any] | Iterable[str] = ()) -> ChosenArm:
    """Read an arm as people write it: ``"mixout"``, ``"mixout:p=0.7"``, or with parameters given apart.

    Args:
        arm: name, and after a colon parameters ``name=value`` with commas between.
        parameters: more of them, by name or as ``"name=value"``.

    Raises:
        ScheduleError: an unknown arm or parameter, one that is no number, or one given twice.
        GuidedDropoutError: a value out of range.
    """
    name, _, inline = arm.partition(":")
    pairs = [_pair(text) for text in inline.split(",") if inline]
    pairs += parameters.items() if isinstance(parameters, Mapping) else [_pair(text) for text in parameters]
    chosen: dict[str, Any] = {}
    for key, value in pairs:
        if key in chosen:
            raise ScheduleError(f"found the parameter {key!r} of the arm {name!r} twice; expected it once")
        chosen[key] = value
    return ChosenArm(name, chosen)


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (equals and name and value):
        raise ScheduleError(f"arm parameter {text!r}; expected name=value, such as p=0.7")
    return name.strip(), value.strip()


def _shown(value: int | float) -> str:
    """In few digits, but so that `choose_arm` reads the same number again."""
    short = f"{value:g}"
    return short if type(value) is float and float(short) == value else repr(value)


def _number(name: str, value: Any, default: int | float) -> int | float:
    """`value` as the type of `default`."""
    kind = type(default)
    try:
        if isinstance(value, bool) or kind(value) != float(value):
            raise ValueError
        return kind(value)
    except (TypeError, ValueError):
        wanted = "a whole number" if kind is int else "a number"
        raise ScheduleError(f"arm parameter {name} is {value!r}; expected {wanted}") from None
