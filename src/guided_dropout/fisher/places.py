"""Where a model's operations have the samples of a batch, and which shortcuts it allows: what `plan` finds out."""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from guided_dropout.fisher.late import LateHead
from guided_dropout.fisher.narrow import Start
from guided_dropout.fisher.operations import Key, Operation


@dataclass(frozen=True)
class Place:
    """Where the samples are in an operation.

    Attributes:
        kind: ``"rows"`` (along `dim` of the operand that the rule names), ``"shared"`` (an embedding looked up once for
            the whole batch; it is looked up per sample instead), ``"targets"`` (target positions only), ``"constant"``
            (nowhere: it makes something of parameters alone), ``"alone"`` (no rule: along `dims` of its tensors and
            along `dim` of its output) or ``"unknown"``.
        interleaved: along `dim`, the samples take turns instead of following one another.
        reason: why it is unknown.
        unpadded: the place in batches without padding, where that is another.
    """

    kind: str
    dim: int = 0
    dims: tuple[int | None, ...] = ()
    interleaved: bool = False
    reason: str = ""
    unpadded: Place | None = None

    def within(self, operation: Operation, num_samples: int) -> Place:
        """The place in a batch: that of unpadded ones where the samples are not where they are in padded ones."""
        if self.unpadded is None:
            return self
        sizes = [t.shape[d] for t, d in zip(operation.tensors(), self.dims, strict=False) if d is not None]
        return self.unpadded if num_samples == 1 or any(n % num_samples for n in sizes) else self


@dataclass(frozen=True)
class Plan:
    """What running the model has shown about it.

    Attributes:
        places: where each operation has the samples.
        head: the module that maps hidden states to the vocabulary, if it can be run at target positions only.
        fallback: parameters that always take the reference loop → why.
        noise: parameters whose true gradient is zero; what is measured of them is rounding.
        late: the same head, if it can also be run after the model's forward.
        start: from where on the model can be run at target positions only.
        unpadded: whether the samples of a batch must be equally long.
        activations: modules that write out what torch does in one operation → that operation (see `activations`).
    """

    places: Mapping[Key, Place]
    head: nn.Module | None
    fallback: Mapping[str, str] = field(default_factory=dict)
    noise: frozenset[str] = frozenset()
    late: LateHead | None = None
    start: Start | None = None
    unpadded: bool = False
    activations: Mapping[nn.Module, Callable[[Tensor], Tensor]] = field(default_factory=dict)

    def place(self, key: Key) -> Place:
        """Where an operation has the samples.

        One that a longer sample repeats more often than was seen has them where all those that were seen have.
        """
        return self.places.get(key) or self._usual.get(key[:2]) or Place("unknown")

    @functools.cached_property
    def _usual(self) -> dict[tuple[tuple[str, ...], str], Place]:
        kinds: defaultdict[tuple[tuple[str, ...], str], set[Place]] = defaultdict(set)
        for key, place in self.places.items():
            kinds[key[:2]].add(place)
        return {kind: next(iter(places)) for kind, places in kinds.items() if len(places) == 1}


@contextlib.contextmanager
def head_at(
    head: nn.Module | None,
    at_targets: Callable[[Tensor], Tensor],
    entered: Callable[[bool], None] = lambda inside: None,
) -> Iterator[None]:
    """Within, `head` sees only what `at_targets` leaves of its input [B, T, d], and gives logits [M, V] for that."""
    if head is None:
        yield
        return

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        entered(True)
        return (at_targets(args[0]), *args[1:])

    def after(*_: Any) -> None:
        entered(False)

    handles = [head.register_forward_pre_hook(before), head.register_forward_hook(after)]
    try:
        yield
    finally:
        for h in handles:
            h.remove()
