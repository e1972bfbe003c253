"""Where dropout happens in a model, found by running it.

A *knob* is a rate that somebody can turn: a dropout module, or a float attribute whose name holds "drop". A *site* is a
knob that is heard: its rate arrives at a dropout call. To tell them apart each knob gets its own tiny rate, the model
runs once in training mode, and the rate that reaches each dropout and attention call says which knob it came from. No
table of architectures is needed, and a knob that nothing listens to cannot pass for a site.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import nn

from guided_dropout.adapters import adapted_layer, adapter_parts, name_before
from guided_dropout.errors import SiteError
from guided_dropout.identity import in_head
from guided_dropout.knobs import ConfigKnob, Knob, find_knobs
from guided_dropout.probe import QUIET, DropoutCall, observe, run_once
from guided_dropout.residual import ATTRIBUTE as RESIDUAL
from guided_dropout.residual import residual_owners
from guided_dropout.unreached import idle_experts, run_beside

GROUPINGS = ("owner", "dataflow")
_STACKS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


@dataclass(frozen=True)
class DropoutSite:
    """A knob whose rate reaches a dropout call.

    Attributes:
        path: path of the dropout module; for a float, of the module that holds it, a dot and the attribute's name.
        kind: ``"attention"`` if the rate reaches attention probabilities, whatever the knob; otherwise ``"module"`` or
            ``"attribute"``, after the knob.
        rate: the rate that its calls receive now, in [0, 1].
        calls: dropout calls in one forward.
        parameters: what feeds it, by owner: the parameters of the module that owns the dropout, as in the paper, or of
            all that share it. Where an owner is a whole stack of layers or has no parameters, the same as `dataflow`.
            Names as in ``model.named_parameters()``; an adapter's own are never among them.
        dataflow: what feeds it, by dataflow: the parameters used since the dropout call before, over all of its calls;
            an adapter's calls part none of the model's own.
        in_head: whether it lies outside the backbone.
        in_adapter: whether an adapter brought it, such as LoRA's dropout; it is fed by the layer that it adapts.
    """

    path: str
    kind: str
    rate: float
    calls: int
    parameters: tuple[str, ...]
    dataflow: tuple[str, ...]
    in_head: bool
    in_adapter: bool = False

    def parameters_by(self, grouping: str) -> tuple[str, ...]:
        """`parameters` for ``"owner"``, `dataflow` for ``"dataflow"``."""
        return {"owner": self.parameters, "dataflow": self.dataflow}[grouping]


@dataclass(frozen=True)
class DropoutTrace:
    """What one forward showed.

    Attributes:
        sites: in the order of their first call.
        calls: path of the site behind each dropout call, in order; an expert that no token was routed to has none.
        dead: paths of the knobs that reach no dropout call: layer drop, leftovers. Rates in a configuration are not
            among them: most modules never look at theirs.
        holders: path of each knob whose calls are told apart → the module that has a forward for each of them.
    """

    sites: tuple[DropoutSite, ...]
    calls: tuple[str, ...]
    dead: tuple[str, ...]
    holders: Mapping[str, nn.Module] = field(default_factory=dict)


def find_sites(
    model: nn.Module, inputs: Mapping[str, Any] | None = None, *, per_call: bool = False
) -> list[DropoutSite]:
    """The model's dropout sites in the order of their first call; arguments and errors as for `trace`."""
    return list(trace(model, inputs, per_call=per_call).sites)


def trace(model: nn.Module, inputs: Mapping[str, Any] | None = None, *, per_call: bool = False) -> DropoutTrace:
    """Run the model once on a tiny batch and see which knob reaches which dropout call.

    Args:
        model: any model; it is left as it was (rates, modes, buffers, random states).
        inputs: keyword arguments of its forward; by default a tiny batch made from its configuration.
        per_call: list each call of a knob that is used several times as a site of its own, ``path[0]``, ``path[1]``,
            …, fed by what was used since the dropout call before. By default a knob has one rate, and is fed by what
            feeds any of its calls.

    Raises:
        SiteError: a dropout call receives a rate that is no knob's, or the model does not run on the tiny batch; with
            `per_call`, a knob that is used several times within one forward of its module.
    """
    knobs = find_knobs(model)
    by_rate = {QUIET * (i + 1): path for i, path in enumerate(knobs)}
    watch = partial(_watch_calls, model, inputs, by_rate)
    calls = watch()
    heard: dict[str, list[DropoutCall]] = {}
    for call in calls:
        heard.setdefault(by_rate[call.rate], []).append(call)
    order = [by_rate[call.rate] for call in calls]
    like = idle_experts(model, [path for path in knobs if path not in heard], list(heard))
    if like:
        cut: set[str] = set()
        for call in watch(run_beside(model, like, cut)):
            if (path := by_rate[call.rate]) in like and path not in cut:
                heard.setdefault(path, []).append(call)
    sites = {path: _site(model, knobs[path], its_calls, heard) for path, its_calls in heard.items()}
    holders: dict[str, nn.Module] = {}
    if per_call:
        several = {path: knobs[path] for path, its_calls in heard.items() if len(its_calls) > 1}
        holders = _holders(model, inputs, several, heard)
        seen = dict.fromkeys(several, 0)
        for place, (path, call) in enumerate(zip(list(order), calls, strict=True)):
            if path in several:
                order[place] = f"{path}[{seen[path]}]"
                sites[order[place]] = _site_of_call(model, sites[path], order[place], call)
                seen[path] += 1
    return DropoutTrace(
        sites=tuple(sites[path] for path in _with_experts(order, like, list(knobs)) if path in sites),
        calls=tuple(order),
        dead=tuple(path for path, knob in knobs.items() if path not in heard and not isinstance(knob, ConfigKnob)),
        holders=holders,
    )


def _watch_calls(
    model: nn.Module,
    inputs: Mapping[str, Any] | None,
    by_rate: Mapping[float, str],
    *contexts: contextlib.AbstractContextManager[Any],
) -> list[DropoutCall]:
    """The calls when each knob has its own rate; those of adapters part nothing that feeds the model's own."""
    probes = {path: rate for rate, path in by_rate.items()}
    calls, fed = [], frozenset[str]()
    for call in observe(model, inputs, *contexts, rates=probes, known=by_rate.keys()):
        if adapted_layer(model, by_rate[call.rate]) is not None:
            calls.append(call)
            fed |= call.parameters
        else:
            calls.append(replace(call, parameters=fed | call.parameters))
            fed = frozenset()
    return calls


def _with_experts(order: list[str], like: Mapping[str, str], knobs: list[str]) -> list[str]:
    """Paths in the order of their first call; experts some of which did not run, in the model's order at the first."""
    alike: dict[str, list[str]] = {}
    for path, neighbour in like.items():
        alike.setdefault(neighbour, []).append(path)
    found: dict[str, None] = {}
    for path in order:
        found |= dict.fromkeys(sorted([path, *alike.get(path, ())], key=knobs.index) if path in alike else [path])
    return list(found)


def knob_path(path: str) -> str:
    """``encoder.dropout[1]``, a site of one call, → ``encoder.dropout``; other paths as they are."""
    return path[: path.rindex("[")] if path.endswith("]") else path


def verify_rates(
    model: nn.Module, before: DropoutTrace, rates: Mapping[str, float], inputs: Mapping[str, Any] | None = None
) -> None:
    """Run the model once with the rates that stand on it now, and prove that each dropout call receives the right one.

    Args:
        model: the model that `before` was traced on, with other rates since.
        before: what `trace` returned.
        rates: the rate that each site's calls should receive; sites not named keep the rate of `before`.
        inputs: as for `trace`.

    Raises:
        SiteError: a call receives another rate than its site's, or is missing although its site's rate is not 0.
    """
    wanted = {site.path: site.rate for site in before.sites} | dict(rates)
    expected = [(path, wanted[path]) for path in before.calls if wanted[path] != 0]
    # Layer drop at its own rate would make calls go missing by chance.
    quiet = dict.fromkeys(find_knobs(model).keys() - set(map(knob_path, wanted)), QUIET)
    received = [call.rate for call in observe(model, inputs, rates=quiet)]
    todo = "the model does not use the rates that stand on its modules; leave it out or change its attn_implementation"
    for (path, rate), got in zip(expected, received, strict=False):
        if got != rate:
            raise SiteError(f"a dropout call of {path} receives rate {got:g}, expected {rate:g}: {todo}")
    if len(received) != len(expected):
        raise SiteError(f"{len(received)} dropout calls receive a rate, expected {len(expected)}: {todo}")


def _site(model: nn.Module, knob: Knob, calls: list[DropoutCall], heard: Iterable[str]) -> DropoutSite:
    dataflow = set().union(*(call.parameters for call in calls))
    owned = _owned_parameters(model, knob, heard)
    return DropoutSite(
        path=knob.path,
        kind="attention" if any(call.on_attention for call in calls) else knob.kind,
        rate=float(knob.rate),
        calls=len(calls),
        parameters=_in_model_order(model, owned or dataflow),
        dataflow=_in_model_order(model, dataflow),
        in_head=in_head(model, knob.path),
        in_adapter=adapted_layer(model, knob.path) is not None,
    )


def _site_of_call(model: nn.Module, site: DropoutSite, path: str, call: DropoutCall) -> DropoutSite:
    dataflow = _in_model_order(model, set(call.parameters)) or site.parameters
    kind = site.kind if site.kind != "attention" else "attention" if call.on_attention else "module"
    return replace(site, path=path, kind=kind, calls=1, parameters=dataflow, dataflow=dataflow)


def _holders(
    model: nn.Module,
    inputs: Mapping[str, Any] | None,
    knobs: Mapping[str, Knob],
    heard: Mapping[str, list[DropoutCall]],
) -> dict[str, nn.Module]:
    """For each of these knobs the module that has one forward for each of its dropout calls: its own, or its owner."""
    candidates = {path: (knob.module, _owner(model, knob)) for path, knob in knobs.items()}
    forwards: Counter[nn.Module] = Counter()

    @contextlib.contextmanager
    def counted(module: nn.Module) -> Iterator[None]:
        hook = module.register_forward_pre_hook(lambda *_: forwards.update([module]))
        try:
            yield
        finally:
            hook.remove()

    run_once(model, inputs, *map(counted, {module for modules in candidates.values() for module in modules}))
    holders: dict[str, nn.Module] = {}
    for path, modules in candidates.items():
        holder = next((module for module in modules if forwards[module] == len(heard[path])), None)
        if holder is None:
            raise SiteError(
                f"{path} is used in {len(heard[path])} dropout calls and {max(forwards[m] for m in modules)} forwards "
                "of its module; expected one call in each, so that calls can be told apart: make the schedule without "
                "per_call"
            )
        holders[path] = holder
    return holders


def _owned_parameters(model: nn.Module, knob: Knob, heard: Iterable[str]) -> set[str]:
    """Names of the parameters of the module that owns the knob; none where that is a stack of layers with sites."""
    adapted = adapted_layer(model, knob.path)
    written_by = residual_owners(knob.module) if knob.attribute == RESIDUAL else None
    owners = (adapted,) if adapted is not None else written_by or _owners(model, knob)
    names = {id(module): name for name, module in model.named_modules()}
    stacks = [
        f"{names[id(m)]}." for owner in owners for m in owner.modules() if m is not owner and isinstance(m, _STACKS)
    ]
    if any(path.startswith(stack) and not adapted_layer(model, path) for path in heard for stack in stacks):
        return set()
    owned = {id(parameter) for owner in owners for parameter in owner.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in owned}


def _owner(model: nn.Module, knob: Knob) -> nn.Module:
    return model.get_submodule(knob.path.rpartition(".")[0]) if knob.kind == "module" else knob.module


def _owners(model: nn.Module, knob: Knob) -> tuple[nn.Module, ...]:
    """The owner, and all others where a dropout module is shared."""
    first = _owner(model, knob)
    if not any(part is knob.module for part in first.children()):
        return (first,)
    return tuple(m for m in model.modules() if any(part is knob.module for part in m.children()))


def _in_model_order(model: nn.Module, names: set[str]) -> tuple[str, ...]:
    """The names in the order of the model's parameters, without those that adapters have added.

    Of a layer and its copies (``modules_to_save``) the one that trains.
    """
    parts = adapter_parts(model)
    found: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        if name in names and not name.startswith(parts):
            place = name_before(name)
            if place not in found or parameter.requires_grad:
                found[place] = name
    return tuple(found.values())
