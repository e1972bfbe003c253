"""Parts of a model that the data chose not to run: experts to which no token was routed.

They are like those that ran, their neighbours in a list or dictionary of modules; so each is run on what such a
neighbour got.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from guided_dropout.probe import tensors_in

_LISTS = (nn.ModuleList, nn.ModuleDict)


def idle_experts(model: nn.Module, idle: Collection[str], heard: Collection[str]) -> dict[str, str]:
    """The knobs of experts that did not run.

    Args:
        model: the model.
        idle: paths of knobs that reached no dropout call.
        heard: paths of those that did.

    Returns:
        Path of an idle knob → path of the same knob on a neighbour of the same class, which was heard.
    """
    by_list: dict[tuple[str, str], str] = {}
    for path in heard:
        for place, _, rest in _in_lists(model, path):
            by_list.setdefault((place, rest), path)
    found: dict[str, str] = {}
    for path in idle:
        for place, key, rest in _in_lists(model, path):
            like = by_list.get((place, rest))
            if like is not None and type(_entry(model, place, like)) is type(model.get_submodule(f"{place}.{key}")):
                found[path] = like
                break
    return found


@contextlib.contextmanager
def run_beside(model: nn.Module, like: Mapping[str, str], cut: set[str]) -> Iterator[None]:
    """Within, experts that do not run are run after the neighbours that do, on the same inputs, for what is heard.

    Args:
        model: the model.
        like: what `idle_experts` returned.
        cut: gets those of its paths that no data chose to leave out: in a stack, where one entry takes what another
            gave, or in what does not run there.
    """
    beside: dict[nn.Module, list[nn.Module]] = {}
    paths_of: dict[nn.Module, list[str]] = {}
    lists: dict[str, dict[str, None]] = {}
    for path, neighbour in like.items():
        place, key, _ = next(p for p in _in_lists(model, path) if neighbour.startswith(f"{p[0]}."))
        lists.setdefault(place, {})[path] = None
        others = beside.setdefault(_entry(model, place, neighbour), [])
        if (expert := model.get_submodule(f"{place}.{key}")) not in others:
            others.append(expert)
        paths_of.setdefault(expert, []).append(path)

    def run_others(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        for expert in beside.pop(module, ()):
            try:
                expert(*args, **kwargs)
            except Exception:  # it has no place in this forward: a layer, say, beyond those that the cache was made for
                cut.update(paths_of[expert])

    def watched(place: str, paths: Mapping[str, None]) -> Iterator[Any]:
        given: list[Tensor] = []

        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if any(t is other for t in tensors_in([args, kwargs]) for other in given):
                cut.update(paths)
            given.extend(tensors_in([output]))

        for entry in model.get_submodule(place).children():
            if entry not in paths_of:
                yield entry.register_forward_hook(note, with_kwargs=True)

    hooks = [hook for place, paths in lists.items() for hook in watched(place, paths)]
    hooks += [module.register_forward_hook(run_others, with_kwargs=True) for module in beside]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _in_lists(model: nn.Module, path: str) -> Iterator[tuple[str, str, str]]:
    """Each list of modules that a path goes through, the innermost first: its path, the entry, the rest.

    An entry is more than a dropout, and none of PEFT's dictionaries', which hold adapters that are turned off, whatever
    the data.
    """
    parts = path.split(".")
    for i in reversed(range(1, len(parts) - 1)):
        place, owner = ".".join(parts[:i]), ".".join(parts[: i - 1])
        with contextlib.suppress(AttributeError):
            of_adapters = hasattr(model.get_submodule(owner), "adapter_layer_names")
            if isinstance(model.get_submodule(place), _LISTS) and not of_adapters:
                yield place, parts[i], ".".join(parts[i + 1 :])


def _entry(model: nn.Module, place: str, path: str) -> nn.Module:
    return model.get_submodule(f"{place}.{path[len(place) + 1 :].partition('.')[0]}")
