"""Samples' Fisher scores at the dropout sites, batch by batch: what rules about their order are told."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from guided_dropout.errors import ArtefactError, DataError

_Array = npt.NDArray[np.float64]
Means = Mapping[str, npt.ArrayLike]
"""For each parameter, [B]: each sample's squared derivatives, averaged over the parameter's elements."""


class Observer(Protocol):
    """Is told each sample's means as the samples are added up.

    Attributes:
        samples: how many it was told.
    """

    samples: int

    def add(self, means: Means) -> None:
        """A batch, in the order of its samples."""

    def state(self) -> dict[str, Any]:
        """What `load_state` needs to go on from here, as plain data for JSON."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave; it may lie before the samples that were added since."""


class StoppingRule(Observer, Protocol):
    """Says when enough samples were seen to settle the order of the sites."""

    @property
    def settled(self) -> bool:
        """Whether no more samples are needed."""
        ...

    def exclude(self, names: Iterable[str]) -> None:
        """Parameters that hold rounding noise alone, named before the first sample."""

    def report(self) -> dict[str, Any]:
        """What was found, as plain data: ``rule``, ``samples``, ``confidence``, ``settled`` and more."""
        ...

    def settings(self) -> dict[str, Any]:
        """What makes two rules the same, as plain data."""
        ...


class SiteScores(ABC):
    """Base of the rules: which parameters feed a site, and each sample's scores.

    A site's score is the mean, over the parameters that feed it, of each one's mean Fisher information. Sites fed by
    the same parameters have the same score and count as one.

    Attributes:
        groups: site → names of the parameters that feed it.
        samples: how many were added.

    Raises:
        DataError: no groups, or one without parameters.
    """

    def __init__(self, groups: Mapping[str, Sequence[str]]):
        self.samples = 0
        self._set_groups(groups)

    def exclude(self, names: Iterable[str]) -> None:
        """Leave parameters out of the scores (a profile's `noise`); before the first sample.

        Raises:
            DataError: samples were added already, or nothing is left to rank a site by.
        """
        if self.samples:
            raise DataError(f"{self.samples} samples are ranked already; expected to leave parameters out before")
        out = frozenset(names)
        self._set_groups({site: [n for n in group if n not in out] for site, group in self.groups.items()})

    def _set_groups(self, groups: Mapping[str, Sequence[str]]) -> None:
        if not groups:
            raise DataError("no sites to rank; expected at least one dropout site")
        if empty := [site for site, names in groups.items() if not names]:
            raise DataError(f"no parameter with a gradient feeds {empty[0]}; expected at least one to rank it by")
        self.groups = {site: tuple(names) for site, names in groups.items()}
        self._alike: dict[frozenset[str], list[str]] = {}
        for site, names in self.groups.items():
            self._alike.setdefault(frozenset(names), []).append(site)
        self._begin(len(self._alike))

    def _check_same(self, state: Mapping[str, Any], settings: Mapping[str, Any], what: str) -> None:
        """Refuse a state of a rule with other settings or other sites.

        Raises:
            ArtefactError: it is.
        """
        for name, here in settings.items():
            if state.get(name) != here:
                raise ArtefactError(
                    f"a {what} begun with {name} {state.get(name)!r}; expected {here!r}: go on with the former, or "
                    "begin anew"
                )
        groups = {site: list(names) for site, names in self.groups.items()}
        there = state.get("groups", {})
        if there != groups:
            odd = next(site for site in {**groups, **there} if groups.get(site) != there.get(site))
            raise ArtefactError(
                f"a {what} begun with {odd} fed by {there.get(odd)}; expected {groups.get(odd)}: go on with the same "
                "model, or begin anew"
            )

    @abstractmethod
    def _begin(self, size: int) -> None:
        """Make room for `size` different sites."""

    def _scores(self, means: Means) -> _Array:
        """[B, S]: the score of each sample at each of the different sites."""
        values = {}
        for name in {name: None for group in self._alike for name in group}:
            if name not in means:
                raise DataError(f"no values of {name}; expected those of each parameter that feeds a site")
            values[name] = np.asarray(means[name], dtype=np.float64)
        if len({v.shape for v in values.values()}) > 1 or next(iter(values.values())).ndim != 1:
            shapes = sorted({str(list(v.shape)) for v in values.values()})
            raise DataError(f"values of shapes {', '.join(shapes)}; expected one number a sample for each parameter")
        for name, v in values.items():
            if not (np.isfinite(v) & (v >= 0)).all():
                raise DataError(f"a mean square of {name} is negative or not finite; expected neither")
        return np.stack([sum(values[name] for name in sorted(group)) / len(group) for group in self._alike], axis=1)
