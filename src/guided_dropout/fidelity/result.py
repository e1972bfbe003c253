"""How good the Fisher of a part of a text is, as a thing that can be saved, loaded and read."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guided_dropout.artefacts import read_json, write_json
from guided_dropout.errors import ArtefactError
from guided_dropout.fisher.profile import FisherProfile

KIND = "fisher-fidelity"
SCHEMA = 1

Values = Sequence[float | None]


@dataclass(frozen=True)
class Cell:
    """Sub-samples of one size on one top set.

    Attributes:
        fraction: share of the text's samples.
        samples: how many these are.
        top: share of the parameters that are compared.
        values: metric (see `metrics`) → its value in each draw; None where it is not defined.
    """

    fraction: float
    samples: int
    top: float
    values: Mapping[str, Values]


@dataclass(frozen=True)
class Order:
    """The schedules of sub-samples of one size.

    Attributes:
        fraction: share of the text's samples.
        samples: how many these are.
        values: ``tau``, ``moved``, ``largest_move`` (see `schedules.order_metrics`) → the value in each draw.
    """

    fraction: float
    samples: int
    values: Mapping[str, Values]


@dataclass(frozen=True)
class Fidelity:
    """The Fisher of sub-samples of a text beside that of all of it.

    Attributes:
        cells: the parameters' values, for each fraction (descending) and each share; empty with scores only.
        orders: the schedules, for each fraction; empty for a model without dropout sites.
        curve: tau of the schedule against the number of samples, see `schedules.curve`; None where tau is not defined.
        bootstrap: what the whole text's own order is worth, see `schedules.bootstrap`; None likewise.
        recommended: the smallest number of samples from which on at least 95 % of the random sub-samples on the curve
            have a tau of at least `tau`; None likewise.
        tau: Kendall's tau that is asked of a schedule.
        grouping: which parameters feed a site.
        num_samples: N, all samples with a target.
        num_skipped: samples without one.
        num_parameters: how many are ranked.
        sites: how many dropout sites are.
        fractions: of the samples, descending.
        tops: shares of the parameters, as given.
        draws: sub-samples of each size.
        seed: of the draws.
        model: what `identity.model_record` says of the model.
        noise: tensors left out, since they hold rounding noise.
        provenance: versions, machine, date, text.
        profile: the whole text's, which came with it; not saved with this.
    """

    cells: tuple[Cell, ...]
    orders: tuple[Order, ...]
    curve: Mapping[str, Any] | None
    bootstrap: Mapping[str, Any] | None
    recommended: int | None
    tau: float
    grouping: str
    num_samples: int
    num_skipped: int
    num_parameters: int
    sites: int
    fractions: tuple[float, ...]
    tops: tuple[float, ...]
    draws: int
    seed: int
    model: Mapping[str, Any]
    noise: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    profile: FisherProfile | None = field(default=None, compare=False, repr=False)

    def cell(self, fraction: float, top: float) -> Cell:
        """The cell of one fraction and share.

        Raises:
            ArtefactError: there is none.
        """
        for cell in self.cells:
            if (cell.fraction, cell.top) == (fraction, top):
                return cell
        raise ArtefactError(
            f"no comparison of a fraction of {fraction:g} on the top {top:g} of the parameters; expected fractions "
            f"{', '.join(f'{f:g}' for f in self.fractions)} and shares {', '.join(f'{t:g}' for t in self.tops)}"
        )

    def save(self, path: str | Path) -> Path:
        """Write one JSON file, all or nothing; return its path.

        Raises:
            ArtefactError: it cannot be written.
        """
        facts = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "profile"}
        facts["cells"] = [vars(cell) for cell in self.cells]
        facts["orders"] = [vars(order) for order in self.orders]
        write_json(path, {"kind": KIND, "schema": SCHEMA, **facts})
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Fidelity:
        """Read what `save` wrote.

        Raises:
            ArtefactError: no such file, another kind of file or schema version, or something is missing in it.
        """
        facts = read_json(path, kind=KIND, schema=SCHEMA)
        names = [name for name in cls.__dataclass_fields__ if name != "profile"]
        try:
            facts["cells"] = tuple(Cell(**cell) for cell in facts["cells"])
            facts["orders"] = tuple(Order(**order) for order in facts["orders"])
            lists = {name: tuple(facts[name]) for name in ("fractions", "tops", "noise")}
            return cls(**{**{name: facts[name] for name in names}, **lists})
        except (KeyError, TypeError) as e:
            raise ArtefactError(f"{path} is no whole {KIND} file ({e}); expected one: make it again") from e


def mean_and_deviation(values: Values) -> tuple[float, float] | None:
    """Mean and standard deviation (n − 1; 0 for one draw) over the draws; None where any is not defined."""
    known = [v for v in values if v is not None]
    if len(known) < len(values) or not known:
        return None
    return math.fsum(known) / len(known), statistics.stdev(known) if len(known) > 1 else 0.0
