"""Where a tensor stands in a model and what kind of a thing it is, read from its path and shape.

No table of architectures: a norm has a weight of one dimension, attention says so in its path, and of what is left in a
layer the matrices that widen are ``intermediate`` and those that narrow are ``output``. A tensor outside of the layers
belongs to the embedding if it comes before the first layer, or later in the backbone and says so in its path (a
decoder's positions, DeBERTa's distances); to the head otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from guided_dropout.fisher.profile import FisherProfile
from guided_dropout.schedule.places import place_of

KINDS = ("embedding", "attention", "intermediate", "output", "norm", "head", "other")


@dataclass(frozen=True)
class TensorPlace:
    """A tensor's place.

    Attributes:
        kind: one of `KINDS`.
        stack: path of the layers that it stands in, as ``bert.encoder.layer``; ``""`` outside of them.
        layer: which of them; −1 before the first layer of all, None after.
    """

    kind: str
    stack: str
    layer: int | None


def tensor_places(shapes: Mapping[str, Sequence[int]], backbone: str = "") -> dict[str, TensorPlace]:
    """The place of each tensor.

    Args:
        shapes: name → shape, in the model's order.
        backbone: what the names of the backbone's tensors begin with, as ``"bert."``; without it the backbone ends
            with the last layer.
    """
    layered = [at for at, name in enumerate(shapes) if place_of(name).layer is not None]
    first, last = (layered[0], layered[-1]) if layered else (len(shapes), 0)
    places = {}
    for at, name in enumerate(shapes):
        place = place_of(name)
        if place.layer is not None:
            stack = place.role[: place.role.index(".*")]
            places[name] = TensorPlace(_kind(name, shapes, place.role[len(stack) :]), stack, place.layer)
        else:
            inside = name.startswith(backbone) if backbone else at < last
            embeds = at < first or (inside and "embed" in name.lower())
            kind = "norm" if _is_norm(name, shapes) else "embedding" if embeds else "head"
            places[name] = TensorPlace(kind, "", -1 if embeds else None)
    return places


@dataclass(frozen=True)
class Group:
    """The tensors of one kind in one layer.

    Attributes:
        place: what they share.
        total: sum of their Fisher values, over all elements.
        size: number of elements.
    """

    place: TensorPlace
    total: float
    size: int

    @property
    def mean(self) -> float:
        """Fisher value of a parameter, on average."""
        return self.total / self.size


def groups(profile: FisherProfile) -> list[Group]:
    """The tensors by layer and kind, rounding noise left out, in the order of the model."""
    sums: dict[TensorPlace, tuple[float, int]] = {}
    for name, place in tensor_places(profile.shapes, profile.model.get("backbone_prefix", "")).items():
        if name in profile.noise:
            continue
        size = 1
        for side in profile.shapes[name]:
            size *= side
        total, count = sums.get(place, (0.0, 0))
        sums[place] = (total + profile.tensor_means[name] * size, count + size)
    return [Group(place, total, size) for place, (total, size) in sums.items()]


def _kind(name: str, shapes: Mapping[str, Sequence[int]], below: str) -> str:
    if _is_norm(name, shapes):
        return "norm"
    if "att" in below.lower():
        return "attention"
    owner, _, own = name.rpartition(".")
    matrix = shapes.get(f"{owner}.weight") if len(shapes[name]) == 1 and own == "bias" else shapes[name]
    if matrix is None or len(matrix) < 2 or (len(matrix) > 2 and own in ("weight", "bias")):  # a convolution
        return "other"
    out, into = matrix[-2], matrix[-1]
    bias = shapes.get(f"{owner}.bias")
    if bias is not None and list(bias) == [into] and out != into:  # stored the other way round, as GPT-2 does
        out, into = into, out
    return "intermediate" if out > into else "output" if out < into else "other"


def _is_norm(name: str, shapes: Mapping[str, Sequence[int]]) -> bool:
    owner, _, own = name.rpartition(".")
    return own in ("weight", "bias") and len(shapes.get(f"{owner}.weight", (0, 0))) == 1
