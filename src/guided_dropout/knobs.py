"""Knobs: the numbers on a model that look like dropout rates, whether or not anything listens to them."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import CodeType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# ``out_drop`` and ``lora_dropout``, but not ``drop_path``, which leaves out whole rows.
_DROPOUT_NAME = re.compile(r"drop(out)?$")
# PEFT's, which would put a dropout of whole blocks of a rotation here: on such a matrix a plain one ruins the layer.
_ON_ROTATIONS = ("boft_dropout", "oft_dropout")


@dataclass(frozen=True)
class _Shared:
    """The configuration that a module shares with others, while a copy with other rates takes its place.

    Attributes:
        config: the shared one.
        rates: by name, those that are others in the copy, as they were when it was made.
    """

    config: PreTrainedConfig
    rates: dict[str, float] = field(default_factory=dict)


_shared: WeakKeyDictionary[nn.Module, _Shared] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Knob:
    """A number on a module that looks like a dropout rate.

    Attributes:
        path: path of the dropout module; for a float, of the module that holds it, a dot and the attribute's name.
        module: the module that holds the number.
        attribute: the number's name on it.
        kind: ``"module"`` or ``"attribute"``.
    """

    path: str
    module: nn.Module
    attribute: str
    kind: str

    @property
    def rate(self) -> float:
        """The number that stands on the module now."""
        return getattr(self.module, self.attribute)

    @property
    def is_there(self) -> bool:
        """Whether the module still has it, as it has no longer when somebody took it out."""
        return hasattr(self.module, self.attribute)

    def turn(self, rate: float) -> None:
        """Let `rate` stand on the module from now on; a knob that is gone from its module stays gone."""
        if self.is_there:
            setattr(self.module, self.attribute, rate)


class ConfigKnob(Knob):
    """A rate that a module reads from its configuration when it runs, as Falcon's layers do.

    Modules share one configuration; the module gets a copy of its own while its rate is another. What is changed in
    the shared one meanwhile stays there, and reaches the module when its rate is its own again.
    """

    @property
    def rate(self) -> float:
        """The number in the module's configuration now."""
        return getattr(getattr(self.module, "config"), self.attribute)  # noqa: B009 (nn.Module has no such name)

    @property
    def is_there(self) -> bool:
        """Whether the module's configuration has it."""
        return hasattr(getattr(self.module, "config", None), self.attribute)

    def turn(self, rate: float) -> None:
        """Let `rate` stand in the module's configuration, and in no other module's."""
        module: Any = self.module
        shared = _shared.setdefault(module, _Shared(module.config))
        if module.config is shared.config:
            module.config = copy.copy(shared.config)
        shared.rates.setdefault(self.attribute, getattr(module.config, self.attribute))
        setattr(module.config, self.attribute, rate)
        if all(getattr(module.config, name) == own for name, own in shared.rates.items()):
            module.config = _shared.pop(module).config


class AbsentKnob(Knob):
    """A dropout that a layer was built without: an identity where there would be a dropout module.

    LoRA builds so at rate 0, and so does ModernBERT's attention. `module` holds the identity and `attribute` is its
    name there. Any rate other than 0 puts a dropout module in its place, 0 the identity.
    """

    @property
    def rate(self) -> float:
        """0 for the identity, otherwise the rate of what stands in its place."""
        return getattr(self.module._modules[self.attribute], "p", 0.0)

    @property
    def is_there(self) -> bool:
        """Whether a dropout module, or the identity, is there."""
        return isinstance(self.module._modules.get(self.attribute), nn.Identity | FilledDropout)

    def turn(self, rate: float) -> None:
        """Put a dropout module of this rate there, or the identity."""
        here = self.module._modules.get(self.attribute)
        if isinstance(here, FilledDropout):
            here.p = rate
            if rate == 0:
                self.module._modules[self.attribute] = here.identity()
        elif isinstance(here, nn.Identity) and rate != 0:
            self.module._modules[self.attribute] = FilledDropout(rate, here)


class FilledDropout(nn.Dropout):
    """Stands where an identity stood, and remembers it."""

    def __init__(self, rate: float, identity: nn.Identity):
        super().__init__(rate)
        self.train(identity.training)
        self._identity = (identity,)  # in a tuple, so that it is no submodule

    def identity(self) -> nn.Identity:
        """The identity, in this module's mode."""
        self._identity[0].train(self.training)
        return self._identity[0]


def find_knobs(model: nn.Module) -> dict[str, Knob]:
    """Every dropout module, or identity in its place, and every float attribute whose name holds "drop", by path.

    Whether anything hears them is another question.
    """
    knobs = [knob for name, module in model.named_modules() for knob in _knobs_of(name, module)]
    return {knob.path: knob for knob in knobs}


def _knobs_of(name: str, module: nn.Module) -> Iterator[Knob]:
    if is_foreign_dropout(module):
        yield Knob(name, module, foreign_rate(module), "module")
    elif isinstance(module, _DropoutNd):
        if not isinstance(module, FilledDropout):
            yield Knob(name, module, "p", "module")
    else:
        for key, value in vars(module).items():
            if "drop" in key.lower() and _is_rate(value):
                yield Knob(f"{name}.{key}" if name else key, module, key, "attribute")
        yield from _in_config(name, module)
        yield from _absent(name, module)


def _absent(name: str, module: nn.Module) -> Iterator[Knob]:
    for key, child in module._modules.items():
        # The entries of a dictionary, as LoRA's, are called after what they are for: its own name says what they are.
        called = name.rpartition(".")[2] if isinstance(module, nn.ModuleDict) else key
        named_so = _DROPOUT_NAME.search(called.lower()) and called not in _ON_ROTATIONS
        if named_so and isinstance(child, nn.Identity | FilledDropout):
            yield AbsentKnob(f"{name}.{key}" if name else key, module, key, "module")


def _in_config(name: str, module: nn.Module) -> Iterator[Knob]:
    from transformers import PreTrainedConfig

    config = vars(module).get("config")
    if isinstance(config, PreTrainedConfig):
        for key, value in vars(config).items():
            if "drop" in key.lower() and _is_rate(value):
                yield ConfigKnob(f"{name}.config.{key}" if name else f"config.{key}", module, key, "attribute")


def is_foreign_dropout(module: nn.Module) -> bool:
    """Whether this is a dropout module that draws its own mask, like DeBERTa's ``StableDropout``.

    It may derive from PyTorch's. One that holds a module of PyTorch's leaves the dropping to that.
    """
    own = isinstance(module, _DropoutNd)
    named_so = _draws(type(module)) if own else type(module).__name__.lower().endswith("dropout")
    named_so = named_so and not any(isinstance(part, _DropoutNd) for part in module.modules() if part is not module)
    return named_so and any(_is_rate(vars(module).get(key)) for key in ("p", "drop_prob"))


def _draws(kind: type[nn.Module]) -> bool:
    """Whether the forward of a class derived from PyTorch's dropout leaves the dropping to no other."""
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    called = _names(code) - {"training"} if code else set()
    # One that calls nothing at all, and reads no rate, drops nothing.
    return bool(called) and not any("dropout" in name.lower() or name == "forward" for name in called)


def _names(code: CodeType) -> set[str]:
    """The names of globals and attributes in code, and in the functions in it."""
    inner = [_names(part) for part in code.co_consts if isinstance(part, CodeType)]
    return set(code.co_names).union(*inner)


def foreign_rate(module: nn.Module) -> str:
    """The name of the rate of such a module."""
    return "drop_prob" if _is_rate(vars(module).get("drop_prob")) else "p"


def _is_rate(value: Any) -> bool:
    """Whether `value` may be a rate. Whole numbers other than 0 are more likely counts."""
    return (isinstance(value, float) and 0.0 <= value <= 1.0) or (type(value) is int and value == 0)
