"""Which parameters a direction moves: all, or a share of them by Fisher information, or as many at random."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from guided_dropout.errors import ArtefactError, DataError, unknown
from guided_dropout.fisher.profile import FisherProfile
from guided_dropout.fisher.topk import Selection, select
from guided_dropout.identity import backbone_name, relative_name

KINDS = ("all", "top", "bottom", "random")
LEVELS = ("parameter", "tensor")
_STREAM = 4


@dataclass(frozen=True)
class Mask:
    """A choice of parameters.

    Attributes:
        kind: ``"all"``, ``"top"`` or ``"bottom"`` (by Fisher), or ``"random"``.
        share: of the parameters that are ranked, in (0, 1]; 1 for ``"all"``.
        equal_norm: whether the masked step is made as long as the unmasked one, so that *which* parameters is a
            question apart from *how many*.
    """

    kind: str = "all"
    share: float = 1.0
    equal_norm: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise DataError(unknown("mask", self.kind, KINDS))
        if not 0 < self.share <= 1 or (self.kind == "all" and self.share != 1):
            raise DataError(f"mask {self.name}; expected all, or top, bottom or random with a share in (0, 1]: top:0.5")

    @classmethod
    def parse(cls, text: str, *, equal_norm: bool = False) -> Mask:
        """``all``, ``top:0.5``, ``bottom:0.5``, ``random:0.5``; ``=`` at the end for a step as long as the unmasked.

        Raises:
            DataError: anything else.
        """
        kind, colon, share = text.removesuffix("=").partition(":")
        if kind not in KINDS:
            raise DataError(unknown("mask", kind, KINDS) + ", the latter three with a share: top:0.5")
        try:
            value = float(share) if colon else 1.0
        except ValueError:
            value = math.nan
        if bool(colon) == (kind == "all") or not 0 < value <= 1:
            raise DataError(f"mask {text}; expected all, or top, bottom or random with a share in (0, 1]: top:0.5")
        return cls(kind, value, kind != "all" and (equal_norm or text.endswith("=")))

    @property
    def name(self) -> str:
        """As `parse` reads it; no two masks have the same."""
        short = f"{self.share:g}"
        share = short if float(short) == self.share else repr(float(self.share))
        return ("all" if self.kind == "all" else f"{self.kind}:{share}") + ("=" if self.equal_norm else "")

    @property
    def title(self) -> str:
        """For people."""
        if self.kind == "all":
            return "all parameters"
        return f"{self.kind} {100 * self.share:g} %" + (", equal length" if self.equal_norm else "")


class Masker:
    """Turns a `Mask` into masks of a model's parameters.

    Shares are shares of the parameters that can move: what no direction moves (held vectors), what the profile does not
    hold, and what it calls noise is neither ranked nor chosen, so that the same share is the same number of parameters
    for top, bottom and random.

    Args:
        model: whose parameters they are.
        profile: of a model with the same backbone; needed for top and bottom.
        level: ``"parameter"``, or ``"tensor"``: whole tensors by their mean, each counting the same, held ones too, as
            the paper's scripts choose them. `Direction.num_moved` tells how few parameters may be left.

    Raises:
        ArtefactError: a profile of another model.
        DataError: an unknown level.
    """

    def __init__(self, model: nn.Module, profile: FisherProfile | None = None, *, level: str = "parameter"):
        if level not in LEVELS:
            raise DataError(unknown("mask level", level, LEVELS))
        self.level, self._profile = level, profile
        self._shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self._relative = {name: backbone_name(model, name) for name in self._shapes}
        self._there = {} if profile is None else _names_there(self._shapes, self._relative, profile)
        self._last: tuple[tuple[object, ...], dict[str, Tensor]] | None = None

    def check(self, mask: Mask) -> None:
        """Make sure, before any long work, that the profile has what a mask needs.

        Raises:
            ArtefactError: no profile, or one of tensor means only.
        """
        if mask.kind in ("top", "bottom") and self.level == "parameter":
            self._required(mask).values("masks of parameters")
        elif mask.kind in ("top", "bottom"):
            self._required(mask)

    def masks(self, mask: Mask, names: Mapping[str, Tensor], *, seed: int = 0) -> dict[str, Tensor]:
        """The masks of the parameters in `names`, those of a direction.

        Args:
            mask: which to choose.
            names: name → any tensor of the parameter's shape: what the unmasked direction moves.
            seed: of random masks, a larger share of which holds a smaller one.

        Returns:
            Name → bool, of the parameter's shape; names of which nothing was chosen may be missing.

        Raises:
            ArtefactError: no profile, or one without what is needed.
            DataError: nothing was chosen.
        """
        if mask.kind == "all":
            return {name: torch.ones(t.shape, dtype=torch.bool) for name, t in names.items()}
        key = (mask.kind, mask.share, seed if mask.kind == "random" else None, tuple(names))
        if self._last is None or self._last[0] != key:  # the same for several seeds in a row
            chosen = self._tensors(mask, seed) if self.level == "tensor" else self._parameters(mask, names, seed)
            self._last = key, {n: m for n, m in chosen.items() if n in names}
        if not any(m.any() for m in self._last[1].values()):
            raise DataError(
                f"mask {mask.name} leaves none of the {sum(t.numel() for t in names.values()):,} parameters that move; "
                "expected at least one: choose a larger share, another --mask-level or --vectors moved"
            )
        return self._last[1]

    def _parameters(self, mask: Mask, names: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
        ranked = [n for n in names if self._profile is None or self._is_ranked(n)]
        if mask.kind == "random":
            keys = {n: self._random(n, tuple(names[n].shape), seed) for n in ranked}
        else:
            values = self._required(mask).values("masks of parameters")
            keys = {n: values[self._there[n]] for n in ranked}
        selection: Selection = select(keys, mask.share, largest=mask.kind != "bottom")
        return {name: selection.mask(name) for name in ranked}

    def _tensors(self, mask: Mask, seed: int) -> dict[str, Tensor]:
        ranked = [n for n in self._shapes if self._profile is None or self._is_ranked(n)]
        if mask.kind == "random":
            scores = {n: float(self._random(n, (), seed)) for n in ranked}
        else:
            means = self._required(mask).tensor_means
            scores = {n: means[self._there[n]] for n in ranked}
        order = sorted(ranked, key=lambda n: scores[n], reverse=mask.kind != "bottom")
        count = math.floor(mask.share * len(order) + 0.5)
        return {n: torch.ones(self._shapes[n], dtype=torch.bool) for n in order[:count]}

    def _is_ranked(self, name: str) -> bool:
        there = self._there.get(name)
        return there is not None and self._profile is not None and there not in self._profile.noise

    def _required(self, mask: Mask) -> FisherProfile:
        if self._profile is None:
            raise ArtefactError(
                f"mask {mask.name} without a Fisher profile; expected one of this model: give --profile"
            )
        return self._profile

    def _random(self, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
        digest = int.from_bytes(hashlib.blake2b(self._relative[name].encode(), digest_size=8).digest(), "big")
        rng = np.random.default_rng([seed, _STREAM, digest])
        return torch.from_numpy(np.asarray(rng.random(shape, dtype=np.float32)))


def _names_there(
    shapes: Mapping[str, tuple[int, ...]], relative: Mapping[str, str], profile: FisherProfile
) -> dict[str, str]:
    """Name here → name in the profile, for all that it holds."""
    prefix = profile.model.get("backbone_prefix", "")
    held = {relative_name(name, prefix): name for name in profile.shapes}
    found = {name: held[relative[name]] for name in shapes if relative[name] in held}
    odd = [name for name, there in found.items() if profile.shapes[there] != shapes[name]]
    if odd or not found:
        what = f"{odd[0]} is {list(profile.shapes[found[odd[0]]])} there, {list(shapes[odd[0]])} here" if odd else ""
        raise ArtefactError(
            f"the profile of {profile.title} is another model's ({what or 'no parameter has a name in it'}); expected "
            "one of the same backbone: estimate one of this model"
        )
    return found
