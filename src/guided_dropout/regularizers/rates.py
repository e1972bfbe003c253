"""Putting a schedule's rates on a model, proving that they arrive, and taking them off again."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, finalize

from torch import nn

from guided_dropout.adapters import is_adapted
from guided_dropout.attention import attention_implementations, takes_dropout
from guided_dropout.errors import ScheduleError, SiteError, describe
from guided_dropout.fisher.profile import FisherProfile, check_profile
from guided_dropout.identity import backbone_name, is_packed, model_identity, relative_name
from guided_dropout.knobs import Knob, find_knobs
from guided_dropout.regularizers.base import Handle
from guided_dropout.regularizers.per_call import set_by_call
from guided_dropout.residual import ATTRIBUTE
from guided_dropout.schedule import DropoutSchedule, site_scores
from guided_dropout.schedule.shapes import check_choice
from guided_dropout.sites import GROUPINGS, DropoutSite, find_sites, knob_path, trace, verify_rates


@dataclass
class _Rates:
    """What stands on one knob: its own rate, and those of its calls that lie on top, with whose they are, latest last.

    Between forwards the rate of the first call stands.
    """

    own: float
    layers: list[tuple[object, list[float]]] = field(default_factory=list)


# By what holds the knobs, not by the model that a schedule was put on: it may be a part of another, or wrapped in one.
_applied: WeakKeyDictionary[nn.Module, dict[tuple[type[Knob], str], _Rates]] = WeakKeyDictionary()


class DropoutHandle(Handle):
    """Takes a schedule off a model again, by `remove` or at the end of a ``with`` block.

    Several schedules may lie on one model, on a part of it, or on what wraps it: the one applied last rules. Handles
    may be removed in any order; each takes off its own schedule only, and the model has its own rates again, exactly,
    when the last one is gone. A handle that is lost without either leaves its rates in the model, for good, and warns;
    so does one whose rates somebody else has changed, when it is removed.

    Attributes:
        model: the model.
        rates: path of each site on this model → the rate that the schedule gives it.
    """

    again = "call apply_dropout again"

    def __init__(self, model: nn.Module, rates: Mapping[str, float], holders: Mapping[str, nn.Module] | None = None):
        super().__init__()
        self.model = model
        self.rates = dict(rates)
        self._holders = dict(holders or {})
        self._calls: dict[str, list[float]] = {}
        for path, rate in rates.items():
            self._calls.setdefault(knob_path(path), []).append(rate)
        self._knobs = {path: knob for path, knob in find_knobs(model).items() if path in self._calls}
        self._layer = object()
        self._proven = False

    def remove(self) -> None:
        """Take the schedule off; a second call does nothing.

        Rates that are no longer those that were set here, so that not all of the training had them, give a warning.
        """
        lost = self._changed_by_others() if self.active and self._proven else {}
        super().remove()
        if lost:
            path, (found, wanted) = next(iter(lost.items()))
            warnings.warn(
                f"{path} of {type(self.model).__name__} has rate {found:g}, expected {wanted:g}, which the schedule "
                f"had set ({len(lost)} of {len(self._knobs)} sites have other rates): something else changed it while "
                "the schedule was on, as TRL's trainers do (disable_dropout) when they are built: build the trainer "
                "first, or use GuidedDropoutCallback",
                stacklevel=2,
            )

    def _changed_by_others(self) -> dict[str, tuple[float, float]]:
        """Path of each knob with a rate that no schedule on it has set → that rate, and the one that ruled."""
        changed = {}
        for path, knob in self._knobs.items():
            rates = _applied.get(knob.module, {}).get((type(knob), knob.attribute))
            # A forward that an error ended leaves the rate of any of the calls.
            if rates and knob.is_there and knob.rate not in (ruling := rates.layers[-1][1]):
                changed[path] = float(knob.rate), ruling[0]
        return changed

    def _put_on(self) -> None:
        for path, knob in self._knobs.items():
            known = _applied.setdefault(knob.module, {})
            rates = known.setdefault((type(knob), knob.attribute), _Rates(knob.rate))
            rates.layers.append((self._layer, self._calls[path]))
        self.on_remove(_take_off, list(self._knobs.values()), self._layer)
        lost = finalize(self, _warn_of_lost, type(self.model).__name__)
        lost.atexit = False
        self.on_remove(lost.detach)
        for path, knob in self._knobs.items():
            knob.turn(self._calls[path][0])
        several = {self._knobs[path]: calls for path, calls in self._calls.items() if len(calls) > 1}
        if several:
            set_by_call(self, self.model, several, self._holders, partial(_on_top, self._layer))


def _take_off(knobs: Iterable[Knob], own: object) -> None:
    """Not a method, so that a handle holds no reference to itself, and is found lost when it is."""
    for knob in knobs:
        key, known = (type(knob), knob.attribute), _applied[knob.module]
        rates = known[key]
        rates.layers = [(layer, calls) for layer, calls in rates.layers if layer is not own]
        knob.turn(rates.layers[-1][1][0] if rates.layers else rates.own)
        if not rates.layers:
            del known[key]


def _warn_of_lost(model: str) -> None:
    warnings.warn(
        f"the handle of a schedule on {model} was lost before it was removed; expected .remove(), or apply_dropout in "
        "a `with` statement: the rates stay in the model",
        ResourceWarning,
        stacklevel=3,
    )


def _on_top(layer: object, knob: Knob) -> bool:
    """Whether nothing lies on a knob above `layer`."""
    rates = _applied.get(knob.module, {}).get((type(knob), knob.attribute))
    return rates is None or rates.layers[-1][0] is layer  # none: a copy of the model, which keeps its rates


def apply_dropout(
    model: nn.Module, schedule: DropoutSchedule | str | Path, inputs: Mapping[str, Any] | None = None
) -> DropoutHandle:
    """Give each dropout site of a model its rate, and prove by running the model that each dropout call receives it.

    The schedule may come from a model with another head around the same backbone; sites in a head that the schedule
    does not name keep their rates, and so do those that an adapter brought. Modes, buffers and random
    states are left as they are. A schedule with a rate for each call (``per_call=True``) sets the rates while the model
    runs, which holds neither under gradient checkpointing, which is refused, nor in a graph of ``torch.compile``: what
    calls these sites then runs uncompiled, and is refused with ``fullgraph=True``.

    Keep the handle: nothing else takes the rates off again, whatever other schedules come and go. Call its `remove`, or
    use it in a ``with`` statement; one that is lost before is told by a ResourceWarning, which Python shows under
    ``-W default`` and in pytest. TRL's trainers for preferences and rewards set all dropout to 0 when they are built:
    build the trainer first, or use `GuidedDropoutCallback`.

    Args:
        model: the model to regularise, in any mode.
        schedule: the rates, or their file.
        inputs: keyword arguments of the model's forward for the proof; by default a tiny batch of token ids.

    Returns:
        A handle that takes the rates off again.

    Raises:
        ScheduleError: the schedule was made for another model, or is none.
        ArtefactError: the file is no schedule.
        SiteError: a rate does not arrive, or one above 0 is for attention that takes none, or for a residual site that
            was there before PEFT wrapped its layer; the model has its former rates again.
    """
    schedule = as_schedule(schedule, "apply_dropout")
    before = trace(model, inputs, per_call=schedule.per_call)
    rates = rates_on(model, schedule, before.sites)
    _check_attention(model, before.sites, rates)
    _check_residual(model, rates)
    handle = DropoutHandle(model, rates, before.holders)
    try:
        handle._put_on()
        verify_rates(model, before, rates, inputs)
    except BaseException:
        handle.remove()
        raise
    handle._proven = True
    return handle


def as_schedule(given: object, who: str) -> DropoutSchedule:
    """A schedule, given itself or by its file.

    Raises:
        ScheduleError: it is neither.
        ArtefactError: the file is no schedule.
    """
    if isinstance(given, str | Path):
        return DropoutSchedule.load(given)
    if isinstance(given, DropoutSchedule):
        return given
    raise ScheduleError(
        f"{who} was given {describe(given)} for a schedule; expected a DropoutSchedule or the path of its file: make "
        "one with DropoutSchedule.from_profile, or of rates by path with DropoutSchedule.from_rates(rates, model)"
    )


def _check_attention(model: nn.Module, sites: Iterable[DropoutSite], rates: Mapping[str, float]) -> None:
    without = [name for name in attention_implementations(model) if not takes_dropout(name)]
    wanted = [site.path for site in sites if site.kind == "attention" and rates.get(site.path, site.rate) > 0]
    if without and wanted:
        raise SiteError(
            f"{without[0]} takes no dropout, and {wanted[0]} has a rate above 0; expected eager, sdpa or flash "
            'attention, or a rate of 0: call model.set_attn_implementation("sdpa"), or give attention sites rate 0'
        )


def _check_residual(model: nn.Module, rates: Mapping[str, float]) -> None:
    for path, rate in rates.items():
        module, _, attribute = knob_path(path).rpartition(".")
        if attribute == ATTRIBUTE and rate > 0 and is_adapted(model, module):
            raise SiteError(
                f"{path} drops what the layer inside of an adapter writes, and not what the adapter adds to it; "
                "expected residual sites that were added after PEFT had wrapped the model: remove them, wrap first, "
                "then add_residual_sites"
            )


def dropout_table(
    model: nn.Module,
    schedule: DropoutSchedule | str | Path | None = None,
    profile: FisherProfile | None = None,
    grouping: str = "owner",
    inputs: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """The model's dropout sites as rows of plain data, in the order of their first call.

    Args:
        model: the model; it is run once on a tiny batch and left as it was.
        schedule: or its file; fills ``scheduled_rate``; None for sites that it leaves alone.
        profile: fills ``score``.
        grouping: which parameters feed a site: ``"owner"`` or ``"dataflow"``.
        inputs: keyword arguments that the model is run with, in the place of the tiny batch.

    Returns:
        One dict a site: ``path``, ``kind``, ``rate`` (now), ``calls``, ``in_head``, ``parameters``, ``score``,
        ``scheduled_rate``.

    Raises:
        ScheduleError: the schedule or the profile belongs to another model; an unknown grouping.
        SiteError: as for `sites.trace`.
    """
    check_choice("grouping", grouping, GROUPINGS)
    schedule = None if schedule is None else as_schedule(schedule, "dropout_table")
    sites = find_sites(model, inputs, per_call=schedule is not None and schedule.per_call)
    rates = rates_on(model, schedule, sites) if schedule else {}
    if profile is not None:
        check_profile(profile, "dropout_table")
    scores = site_scores(profile, model, sites, grouping) if profile else {}
    return [
        {
            "path": site.path,
            "kind": site.kind,
            "rate": site.rate,
            "calls": site.calls,
            "in_head": site.in_head,
            "parameters": list(site.parameters_by(grouping)),
            "score": scores.get(site.path),
            "scheduled_rate": rates.get(site.path),
        }
        for site in sites
    ]


def rates_on(model: nn.Module, schedule: DropoutSchedule, sites: Iterable[DropoutSite]) -> dict[str, float]:
    """Path of each site on this model that the schedule has a rate for → that rate, once the two belong together.

    Raises:
        ScheduleError: they do not.
    """
    made_on, here = schedule.model["model_type"], model_identity(model)["model_type"]
    if made_on != here:
        raise _another_model(f"it was made on model type {made_on!r}, {type(model).__name__} is {here!r}")
    rates = _matched_rates(model, schedule, sites)
    parameters = {backbone_name(model, name): p for name, p in model.named_parameters()}
    for name, shape in schedule.model["shapes"].items():
        here = parameters.get(name)
        if here is None or (list(here.shape) != shape and not is_packed(here)):
            found = "missing" if here is None else list(here.shape)
            raise _another_model(f"{name} is {found} in {type(model).__name__}, {shape} in the schedule")
    return rates


def _matched_rates(model: nn.Module, schedule: DropoutSchedule, sites: Iterable[DropoutSite]) -> dict[str, float]:
    """Match sites by their place relative to the backbone, each side with its own prefix."""
    prefix = schedule.model["backbone_prefix"]
    left = {(not path.startswith(prefix), relative_name(path, prefix)): path for path in schedule.rates}
    rates = {}
    for site in sites:
        path = left.pop((site.in_head, backbone_name(model, site.path)), None)
        if path is not None:
            rates[site.path] = schedule.rates[path]
        elif not (site.in_head or site.in_adapter):
            raise _another_model(f"it has no rate for {site.path}, a dropout site of {type(model).__name__}")
    for path in left.values():
        if path.rpartition(".")[2] == ATTRIBUTE:
            raise ScheduleError(
                f"{path} is no dropout site of {type(model).__name__} before residual sites are added to it; expected "
                "a model that has them: --residual-sites on the command line, or add_residual_sites(model)"
            )
        raise _another_model(f"{path} is no dropout site of {type(model).__name__}")
    return rates


def _another_model(difference: str) -> ScheduleError:
    return ScheduleError(
        f"a schedule for another model: {difference}; expected the same backbone with the same sites: make a schedule "
        "on this model, or without the head's sites if it is these that differ"
    )
