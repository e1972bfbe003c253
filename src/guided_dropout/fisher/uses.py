"""What the operations of one batch contribute to each parameter, squared as soon as nothing more can come."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from guided_dropout.fisher.dense import OneByOne, Part, add_dense_squares, swapped
from guided_dropout.fisher.operations import Origin, View
from guided_dropout.fisher.squares import Outer, Rows, Sums, Use, add_squares, squared_early
from guided_dropout.fisher.totals import Totals


class Uses:
    """The uses of all parameters in one batch.

    Args:
        parameters: by name.
        totals: get the squares added.
        num_samples: B.
        unwanted: parameters that are left to the reference loop whatever the batch.
        with_sums: whether the samples' sums are wanted; where only scores are, they always are.

    Attributes:
        sums: name → [B] float64, each sample's sum of squares over the parameter's elements, where that is wanted.
        uncovered: parameters that this batch leaves to the reference loop → why.
        samples: whose squares are being taken.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        totals: Totals,
        num_samples: int,
        *,
        unwanted: Iterable[str] = (),
        with_sums: bool = False,
    ):
        self.uncovered: dict[str, str] = {}
        self.samples = slice(None)
        self.sums: dict[str, Tensor] = {}
        if with_sums or totals.scores_only:
            self.sums = {
                n: torch.zeros(num_samples, dtype=torch.float64, device=p.device) for n, p in parameters.items()
            }
        self._parameters, self._totals, self._num_samples = parameters, totals, num_samples
        self._unwanted = frozenset(unwanted)
        self._expected: defaultdict[str, Counter[View]] = defaultdict(Counter)
        self._looked_up: defaultdict[str, list[Tensor]] = defaultdict(list)  # rows of tables, by parameter
        self._behind: set[str] = set()  # parameters with derived tensors in use
        self._parts: defaultdict[str, list[Part]] = defaultdict(list)
        self._derived: list[tuple[Origin, Use | OneByOne]] = []

    def expect(self, origins: Iterable[Origin]) -> None:
        """An operation's backward will bring uses of these."""
        for o in origins:
            if o.view is None:
                self._behind.update(o.names)
            else:
                self._expected[o.names[0]][o.view.upright()] += 1

    def look_up(self, origin: Origin, ids: Tensor) -> None:
        """Rows of a table are read: what else is squared early needs to know them."""
        if origin.view is not None:
            self._looked_up[origin.names[0]].append(ids.reshape(-1))

    def take(self, uses: Mapping[str, Use | OneByOne], roles: Mapping[str, Origin]) -> None:
        """Square an operation's uses, or keep those of parameters that are used again."""
        for role, use in uses.items():
            origin = roles.get(role)
            if origin is None:
                continue
            if origin.view is None:
                self._derived.append((origin, use))
                continue
            (name,), view = origin.names, origin.view
            if name in self.uncovered or name in self._unwanted:
                continue
            if self._is_once(name, view) and self._square(name, [(view, use)]):
                continue
            self._parts[name].append(self._squared_early(name, view, use))

    def _squared_early(self, name: str, view: View, use: Use | OneByOne) -> Part:
        """Square the only products with a tied table at once, where all else that is done with it are look-ups."""
        if not (isinstance(use, Outer) and self._is_tied(name, view)):
            return view, use
        total = None if self._totals.scores_only else self._totals[name]
        outer = use if view == view.upright() else swapped(use)
        return view.upright(), squared_early(total, outer, torch.cat(self._looked_up[name]), self._sums_of(name))

    def is_squared_at_once(self, origin: Origin) -> bool:
        """Whether nothing else that is done with it is needed for its squares."""
        (name, *_), view = origin.names, origin.view
        return view is not None and (self._is_once(name, view) or self._is_tied(name, view))

    def _is_once(self, name: str, view: View) -> bool:
        """Whether these elements of a parameter are used once in a sample, and apart from all others."""
        return self._expected[name][view.upright()] == 1 and name not in self._behind and self._apart(name)

    def _is_tied(self, name: str, view: View) -> bool:
        """Whether a parameter as a whole is used once, and otherwise looked up."""
        looked_up, upright = self._looked_up[name], view.upright()
        rest = looked_up and self._expected[name] == {upright: len(looked_up) + 1} and name not in self._behind
        return bool(rest) and upright.size == self._parameters[name].shape

    def _sums_of(self, name: str) -> Tensor | None:
        """Where the sums of the samples in hand are added."""
        sums = self.sums.get(name)
        return None if sums is None else sums[self.samples]

    def _apart(self, name: str) -> bool:
        """Whether the parts of a parameter that are in use have no element in common."""
        views = sorted(self._expected[name], key=lambda v: v.offset)
        return all(a.end() <= b.offset for a, b in itertools.pairwise(views))

    def square_kept(self, leaves: Mapping[str, Tensor]) -> None:
        """Square what waited for all uses of its parameter; `leaves` as in `dense.add_dense_squares`."""
        parts = {n: p for n, p in self._parts.items() if n not in self.uncovered}
        dense: dict[str, list[Part]] = {
            n: parts.get(n, []) for n in self._behind if n not in self.uncovered and n not in self._unwanted
        }
        for name in parts.keys() - dense.keys():
            groups: defaultdict[View, list[Part]] = defaultdict(list)
            for view, use in parts[name]:
                groups[view.upright()].append((view, use))
            if not self._apart(name):
                dense[name] = parts[name]
                continue
            left = [part for group in groups.values() if not self._square(name, group) for part in group]
            if left:
                dense[name] = left
        if dense:
            add_dense_squares(self._totals, self.sums, dense, self._derived, leaves, self._num_samples)

    def _square(self, name: str, parts: Sequence[Part]) -> bool:
        """Square uses of the same elements of a parameter, if they have a compact form."""
        view = parts[0][0].upright()
        uses = [swapped(u) if v != view and isinstance(u, Outer) else u for v, u in parts]
        if any(isinstance(u, OneByOne) or (v != view and not isinstance(u, Outer)) for v, u in parts):
            return False
        compact = [u for u in uses if not isinstance(u, OneByOne)]
        vectors = sum(isinstance(u, Sums) for u in compact)
        totals = self._totals
        total = None if totals.scores_only else view.within(totals[name])
        if vectors not in (0, len(compact)):
            return False
        matrix = next((u for u in compact if isinstance(u, Outer)), None)
        if matrix is not None and len(view.size) != 2:
            if any(isinstance(u, Rows) for u in compact) or not view.is_contiguous():
                return False
            total = None if total is None else total.view(matrix.left.shape[1], matrix.right.shape[1])
        add_squares(total, compact, self._sums_of(name))
        return True
