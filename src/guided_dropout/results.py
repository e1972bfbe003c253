"""What one fine-tuning run gave, as a thing that can be saved, loaded and compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from guided_dropout.artefacts import check_output_folder, read_json, write_json
from guided_dropout.errors import ArtefactError, DataError

KIND = "run-result"
SCHEMA = 1
JSON_NAME = "result.json"

_FIELDS = {"str": str, "bool": bool, "list": list, "Mapping": dict}  # how an annotation begins → what JSON has for it
_NUMBER_OR_NONE = (int, float, type(None))


@dataclass(frozen=True)
class Seeds:
    """Where a run's chance comes from. Runs with the same seeds differ in their arm only.

    Attributes:
        subset: which examples are training data: the deal of a new split (paper, holdout), and which part of the
            training data is kept; two independent draws by one seed.
        head: the new weights.
        order: the order of the training data.
        noise: dropout.
    """

    subset: int
    head: int
    order: int
    noise: int

    @classmethod
    def derive(cls, seed: int) -> Seeds:
        """Four independent seeds from one.

        They are far apart on purpose: the Trainer shuffles epoch e by ``order + e``, so that neighbouring order seeds
        would show two restarts the same permutations.

        Raises:
            DataError: a seed below 0.
        """
        if seed < 0:
            raise DataError(f"the seed {seed}; expected 0 or more")
        subset, head, order, noise = (int(s) for s in np.random.SeedSequence(seed).generate_state(4))
        return cls(subset, head, order, noise)


@dataclass(frozen=True)
class RunResult:
    """One fine-tuning run.

    Attributes:
        task: name of the task.
        arm: what it trained with: a name in `arms.ARMS`, and the parameters that differ from their defaults.
        metric: name of the task's main metric.
        value: its value on the validation split after the *last* epoch; None if the run diverged. Not the best epoch's:
            that would be chosen on the split that it is reported on.
        metrics: all of the task's metrics after the last epoch; those of further evaluation splits with the split's
            name behind, such as ``"accuracy_mismatched"``.
        history: for each epoch ``epoch``, ``train_loss`` (mean over its steps, with what the
            arm adds to it) and, where it was evaluated after that epoch, ``eval_loss`` and ``metrics``.
        diverged: a loss became infinite or NaN; the run was stopped at the end of that epoch.
        collapsed: all predictions after the last epoch were one class. Always false for regression.
        seeds: see `Seeds`.
        recipe: everything else that a rerun needs, with the numbers of examples, how they were split and the classes.
        rates: the dropout rates: ``shape``, ``sites``, ``mean``, ``min``, ``max``.
        pairing: digests of what must be equal between arms with the same seeds: ``weights`` before the first step,
            ``batches``, the training examples in the order in which they were read, and ``evaluation``, the examples
            that are evaluated.
        model: what `identity.model_record` says of the model.
        times: seconds: ``train``, ``eval``, ``total`` (loading included).
        provenance: versions, machine, date, device.
        arm_parameters: all parameters of the arm by name.
        arm_facts: what the arm found on this model, such as the layers that it trains.
    """

    task: str
    arm: str
    metric: str
    value: float | None
    metrics: Mapping[str, float | None]
    history: list[dict[str, Any]]
    diverged: bool
    collapsed: bool
    seeds: Seeds
    recipe: Mapping[str, Any]
    rates: Mapping[str, Any]
    pairing: Mapping[str, str]
    model: Mapping[str, Any]
    times: Mapping[str, float]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    arm_parameters: Mapping[str, Any] = field(default_factory=dict)
    arm_facts: Mapping[str, Any] = field(default_factory=dict)

    def save(self, folder: str | Path) -> Path:
        """Write ``result.json`` into `folder`, all or nothing; return the file's path.

        Raises:
            ArtefactError: the folder cannot be written, or holds other things than a result.
        """
        path = check_output_folder(folder, marker=JSON_NAME) / JSON_NAME
        write_json(path, {"kind": KIND, "schema": SCHEMA, **asdict(self)})
        return path

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> RunResult:
        """The result whose `dataclasses.asdict` is `facts`.

        Raises:
            KeyError, TypeError: what is missing, unknown, or of another type than a run writes.
        """
        result = cls(**{**facts, "seeds": Seeds(**facts["seeds"])})
        for name, value, wanted in result._typed():
            # A truth value counts as a number in Python.
            if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
                raise TypeError(f"{name} is {value!r}")
        return result

    def _typed(self) -> Iterator[tuple[str, Any, tuple[type, ...]]]:
        """What reports compute with, and of which types it must be."""
        for f in fields(self):
            kind = next((kind for begin, kind in _FIELDS.items() if str(f.type).startswith(begin)), None)
            if kind:
                yield f.name, getattr(self, f.name), (kind,)
        for name, seed in vars(self.seeds).items():
            yield f"seeds.{name}", seed, (int,)
        yield "value", self.value, _NUMBER_OR_NONE
        for n, epoch in enumerate(self.history):
            yield f"history[{n}]", epoch, (dict,)
        ends = [(f"history[{n}].", epoch.get("metrics", {})) for n, epoch in enumerate(self.history)]
        for place, metrics in [("", self.metrics), *ends]:
            yield f"{place}metrics", metrics, (dict,)
            for name, value in metrics.items():
                yield f"{place}metrics.{name}", value, _NUMBER_OR_NONE
        for name, seconds in self.times.items():
            yield f"times.{name}", seconds, (int, float)

    @classmethod
    def load(cls, path: str | Path) -> RunResult:
        """Read what `save` wrote.

        Args:
            path: the folder or the file.

        Raises:
            ArtefactError: missing, damaged, or of another version.
        """
        path = Path(path)
        file = path / JSON_NAME if path.is_dir() else path
        facts = read_json(file, kind=KIND, schema=SCHEMA)
        del facts["kind"], facts["schema"]
        try:
            return cls.of(facts)
        except (KeyError, TypeError) as e:
            raise ArtefactError(f"{file} is not a whole {KIND} ({e}); expected what a run wrote: run it again") from e
