"""Running sums of squares that stay accurate over any number of samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

# Float32 sums of this many squares are right to about 1e-6; memory for the float64 ones is taken only after that.
FLUSH_EVERY = 1024


class Totals:
    r"""For each parameter the sum of :math:`g_i^2` over the samples i: float32 partial sums, flushed into float64.

    With `scores_only` the sum also runs over the parameter's elements: one float64 number each, no partial sums.

    Args:
        parameters: name → parameter.
        scores_only: keep one number per parameter instead of a tensor of its shape.
    """

    def __init__(self, parameters: Mapping[str, Tensor], *, scores_only: bool = False):
        self.scores_only = scores_only
        self._partial = {name: self._zeros(p) for name, p in parameters.items()}
        self._exact: dict[str, Tensor] = {}
        self._since_flush = 0

    def _zeros(self, p: Tensor) -> Tensor:
        if self.scores_only:
            return torch.zeros((), dtype=torch.float64, device=p.device)
        return torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32), requires_grad=False)

    def __getitem__(self, name: str) -> Tensor:
        """The partial sum, to be added to in place: of the parameter's shape, or a float64 scalar (scores only)."""
        return self._partial[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._partial)

    def counted(self, samples: int) -> None:
        """Note that the squares of so many further samples have been added; flush where it is time."""
        self._since_flush += samples
        if self._since_flush >= FLUSH_EVERY:
            self.flush()

    def flush(self) -> None:
        """Move the float32 partial sums into float64 ones."""
        for name, partial in self._partial.items():
            if partial.dtype == torch.float32:
                if name in self._exact:
                    self._exact[name] += partial
                else:
                    self._exact[name] = partial.double()
                partial.zero_()
        self._since_flush = 0

    def clear(self) -> None:
        """Begin anew from zero; the memory of the float64 sums is given back."""
        for partial in self._partial.values():
            partial.zero_()
        self._exact = {}
        self._since_flush = 0

    def total(self, name: str) -> Tensor:
        """The whole sum of a parameter: float64 once anything was flushed, otherwise as the partial sums are."""
        exact = self._exact.get(name)
        return self._partial[name] if exact is None else exact + self._partial[name]

    def element_sums(self) -> dict[str, float]:
        """For each parameter, the sum over its elements and all samples, in float64."""
        return {name: self.total(name).sum(dtype=torch.float64).item() for name in self}

    def state(self) -> dict[str, Tensor]:
        """What `load_state` needs to go on from here with the same result, as tensors by name."""
        partial = {f"partial/{name}": t for name, t in self._partial.items()}
        exact = {f"exact/{name}": t for name, t in self._exact.items()}
        since = torch.tensor(self._since_flush)
        return {**partial, **exact, "since_flush": since}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up a state that `state` gave, of the same parameters."""
        for name, partial in self._partial.items():
            partial.copy_(state[f"partial/{name}"])
        self._exact = {
            name: state[key].to(self._partial[name].device, copy=True)
            for name in self._partial
            if (key := f"exact/{name}") in state
        }
        self._since_flush = int(state["since_flush"])
