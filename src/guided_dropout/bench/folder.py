"""The folder of an experiment: what all of its runs share, and one JSON file for each run.

- ``experiment.json``: what every run is made with; runs of anything else are refused.
- ``grid.json``: which runs were asked for so far.
- ``runs/<RunKey.name>.json``: a result, or the failure of a run.
- ``runs/.<RunKey.name>.lock``: somebody is making that run, while the lock is held.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from guided_dropout.artefacts import check_output_folder, read_json, write_json
from guided_dropout.bench.arms import evaluated_on
from guided_dropout.bench.grid import Grid, RunKey
from guided_dropout.errors import ArtefactError, GuidedDropoutError
from guided_dropout.provenance import provenance
from guided_dropout.results import RunResult
from guided_dropout.unfinished import differing

EXPERIMENT, GRID = "experiment.json", "grid.json"
_RUNS, _LOCK, _MODELS = "runs", ".experiment.lock", "models"
KIND, GRID_KIND, RUN_KIND, SCHEMA = "bench-experiment", "bench-grid", "bench-run", 1


@dataclass(frozen=True)
class Failure:
    """Why a run has no result.

    Attributes:
        error: type of the exception, or what became of the process.
        message: its text.
        traceback: as Python prints it.
    """

    error: str
    message: str
    traceback: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        r"""What is kept of an exception; half characters, which UTF-8 cannot hold, as ``\ud83d``."""
        texts = (type(error).__name__, str(error), "".join(traceback.format_exception(error)))
        return cls(*(text.encode("utf-8", "backslashreplace").decode("utf-8") for text in texts))


@dataclass(frozen=True)
class Run:
    """One run of an experiment: either `result` or `failure` is there.

    Attributes:
        key: which.
        result: what it gave.
        failure: why it gave nothing.
    """

    key: RunKey
    result: RunResult | None = None
    failure: Failure | None = None

    @property
    def status(self) -> str:
        """``"failed"``, ``"diverged"``, ``"collapsed"`` (all predictions one class) or ``"ok"``."""
        if self.result is None:
            return "failed"
        return "diverged" if self.result.diverged else "collapsed" if self.result.collapsed else "ok"


class Experiment:
    """An experiment's folder.

    Args:
        path: the folder.

    Attributes:
        path: likewise.
        facts: what all runs share: ``recipe`` and whatever else was given to `start`.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.facts = read_json(self.path / EXPERIMENT, kind=KIND, schema=SCHEMA)

    @classmethod
    def start(cls, path: str | Path, facts: Mapping[str, Any]) -> Experiment:
        """Begin an experiment in a new folder, or go on with one that was begun with the same facts.

        Models may join it later, and so may the profile and schedule of one that had none.

        Args:
            path: the folder.
            facts: what all runs share, as plain data; under ``"models"`` what is known of each.

        Raises:
            ArtefactError: the folder holds other things, or runs of another recipe; both sides are shown.
        """
        path = check_folder(path)
        path.mkdir(parents=True, exist_ok=True)
        file = path / EXPERIMENT
        with _alone(path):
            if not file.exists():
                write_json(file, {"kind": KIND, "schema": SCHEMA, **facts, "provenance": provenance()})
            experiment = cls(path)
            experiment.check(facts)
            joined = experiment._joined(facts)
            if any(m != _known(experiment.facts.get(_MODELS, {}).get(n, {})) for n, m in joined.items()):
                models = experiment.facts.get(_MODELS, {}) | joined
                write_json(file, {**experiment.facts, _MODELS: models})
        return cls(path)

    def check(self, facts: Mapping[str, Any]) -> None:
        """Make sure that runs with these facts may join.

        Raises:
            ArtefactError: they are of another recipe; both sides are shown.
        """
        given = {n: _known(m) for n, m in facts.get(_MODELS, {}).items()}
        joined = self._joined(facts)
        there = {n: {k: joined[n][k] for k in m} for n, m in given.items()}
        recipe = {k: self.facts.get(k) for k in facts}
        different = _differences({**recipe, _MODELS: there}, {**facts, _MODELS: given})
        if different:
            raise ArtefactError(
                f"{self.path} holds an experiment with another recipe ({different}); expected the same one: "
                "choose another --out, or the recipe that it was begun with"
            )

    def _joined(self, facts: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """The models of `facts`, each with what is known of it here before what is given."""
        there = self.facts.get(_MODELS, {})
        return {n: _known(m) | _known(there.get(n, {})) for n, m in facts.get(_MODELS, {}).items()}

    def note_grid(self, grid: Grid) -> None:
        """Add to what is to be run; nothing where all of it was asked for before."""
        with _alone(self.path):
            grids = self.grids
            if set(grid) <= {key for g in grids for key in g}:
                return
            kept = [g for g in grids if not set(g) <= set(grid)]
            write_json(
                self.path / GRID,
                {"kind": GRID_KIND, "schema": SCHEMA, "grids": [asdict(g) for g in (*kept, grid)]},
            )

    @property
    def grids(self) -> list[Grid]:
        """All that was asked for.

        Raises:
            ArtefactError: it cannot be read.
        """
        file = self.path / GRID
        if not file.exists():
            return []
        mend = "delete the file, and ask `guided-dropout bench run` again for all that was asked for"
        try:
            facts = read_json(file, kind=GRID_KIND, schema=SCHEMA)
            axes = {k: v for k, v in facts.items() if k not in ("kind", "schema")}  # as of when there was only one
            return [Grid(**g) for g in facts.get("grids", [axes])]
        except ArtefactError as e:
            raise ArtefactError(f"{e} ({mend})") from e
        except (TypeError, GuidedDropoutError) as e:
            raise ArtefactError(f"{file} is damaged ({e}); expected what `bench run` wrote: {mend}") from e

    def is_done(self, key: RunKey) -> bool:
        """Whether the run is there, be it as a failure; not where its file is damaged.

        Raises:
            ArtefactError: the file holds another run, whose key spells the same name.
        """
        run = self._whole(self.file(key))
        if run is not None and run.key != key:
            raise ArtefactError(
                f"{self.file(key)} holds the run {run.key}; expected {key}: give the model's folder another name, "
                "choose fractions that differ by more, or choose another --out"
            )
        return run is not None

    def damaged(self, keys: Iterable[RunKey]) -> list[Path]:
        """The files of these runs that are there and cannot be read."""
        return [f for f in map(self.file, keys) if f.exists() and self._whole(f) is None]

    def failed(self) -> set[RunKey]:
        """The runs that failed."""
        return {run.key for run in self.whole_runs() if run.failure}

    def forget_failures(self, keys: Iterable[RunKey] | None = None) -> int:
        """Delete the runs that failed, of `keys` or all, so that they are made again; returns how many."""
        failed = self.failed() if keys is None else self.failed() & {*keys}
        for key in failed:
            self.file(key).unlink(missing_ok=True)
        return len(failed)

    def file(self, key: RunKey) -> Path:
        """Where a run is written."""
        return self.path / _RUNS / f"{key.name}.json"

    def write(self, run: Run) -> Path:
        """Write a run, all or nothing."""
        result = None if run.result is None else asdict(run.result)
        failure = None if run.failure is None else asdict(run.failure)
        facts = {"kind": RUN_KIND, "schema": SCHEMA, "key": asdict(run.key), "failure": failure, "result": result}
        write_json(self.file(run.key), facts)
        return self.file(run.key)

    def check_alike(self, key: RunKey, facts: Mapping[str, Any]) -> None:
        """Make sure that a run can be reported with those of its model, task and fraction that are there.

        Args:
            key: which run.
            facts: what is known of its `shared_facts`.

        Raises:
            ArtefactError: those there have others; both sides are shown.
        """
        there = next(self._results_beside(key), None)
        if there is None:
            return
        known = shared_facts(there)
        if different := _differences({k: known.get(k) for k in facts}, facts):
            raise ArtefactError(
                f"{self.path} holds runs of {key.model}, {key.task}, fraction {key.fraction:g} that were made in "
                f"another way ({different}); expected the same one, since no report can hold both: choose "
                "another --out"
            )

    def _results_beside(self, key: RunKey) -> Iterator[RunResult]:
        begins = replace(key, arm="", seed=0).name.removesuffix("_000")
        for file in sorted((self.path / _RUNS).glob(f"{begins}*.json")):
            run = self._whole(file)
            if run and run.result and replace(run.key, arm=key.arm, seed=key.seed) == key:
                yield run.result

    def read(self, file: Path) -> Run:
        """Read a run.

        Raises:
            ArtefactError: not a whole run.
        """
        mend = "run `guided-dropout bench run` again, or delete the file"
        try:
            facts = read_json(file, kind=RUN_KIND, schema=SCHEMA)
        except ArtefactError as e:
            raise ArtefactError(f"{e} ({mend})") from e
        try:
            result = None if facts["result"] is None else RunResult.of(facts["result"])
            failure = None if facts["failure"] is None else Failure(**facts["failure"])
            key = RunKey(**facts["key"])
            Grid([key.model], [key.task], [key.arm], [key.fraction], [key.seed])  # refuses what no run has
            return Run(key, result, failure)
        except (KeyError, TypeError, ValueError, GuidedDropoutError) as e:
            raise ArtefactError(f"{file} is not a whole run ({e}); expected what `bench run` wrote: {mend}") from e

    def runs(self) -> list[Run]:
        """All runs that are there, by key.

        Raises:
            ArtefactError: one of them is not whole.
        """
        return sorted((self.read(f) for f in sorted((self.path / _RUNS).glob("[!.]*.json"))), key=lambda r: r.key)

    def whole_runs(self) -> list[Run]:
        """Likewise, without those that cannot be read, as a machine that went down may leave them."""
        whole = map(self._whole, sorted((self.path / _RUNS).glob("[!.]*.json")))
        return sorted((run for run in whole if run), key=lambda r: r.key)

    def _whole(self, file: Path) -> Run | None:
        try:
            return self.read(file)
        except ArtefactError:
            if _is_of_another(file):
                raise
            return None

    @contextmanager
    def claim(self, key: RunKey) -> Iterator[bool]:
        """Within, the run is this process's own; False where another process has it, and nothing is held then.

        A claim ends with the process, however that ends. Its file goes once the run is there: look for the run after
        taking a claim, for another process may have had it until a moment ago.
        """
        (self.path / _RUNS).mkdir(exist_ok=True)
        lock = FileLock(self.path / _RUNS / f".{key.name}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            if self._whole(self.file(key)):
                _remove_held(lock)
            lock.release()

    def remove_claims(self) -> None:
        """Remove the claims of runs that are there and nobody holds, as processes that were killed leave them."""
        for file in (self.path / _RUNS).glob(".*.lock"):
            if file.with_name(f"{file.stem[1:]}.json").exists():
                with suppress(OSError), FileLock(file, timeout=0) as lock:
                    _remove_held(lock)


def _is_of_another(file: Path) -> bool:
    """Whether it is whole, and of another version or something else: nothing to write over."""
    try:
        facts = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(facts, dict) and (facts.get("kind", RUN_KIND), facts.get("schema", SCHEMA)) != (RUN_KIND, SCHEMA)


def shared_facts(result: RunResult) -> dict[str, Any]:
    """What all runs of a model, task and fraction must have in common, but for the model itself."""
    return {**result.recipe, "evaluation": evaluated_on(result)}


def _known(model: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in model.items() if v is not None}


def check_folder(path: str | Path) -> Path:
    """Make sure that an experiment can begin in this folder, or go on in it.

    Raises:
        ArtefactError: it cannot be written, or holds other things.
    """
    return check_output_folder(path, marker=EXPERIMENT, begun=_LOCK)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Within, of all processes that ask for it this is the only one."""
    with FileLock(folder / _LOCK) as lock:
        try:
            yield
        finally:
            _remove_held(lock)


def _remove_held(lock: BaseFileLock) -> None:
    """Remove the file of a lock that is held: filelock (from 3.30 on) starts over where the file it locked is gone."""
    with suppress(OSError):  # on Windows an open file stays, until filelock removes it
        Path(lock.lock_file).unlink()


def _differences(there: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """As messages show them; what is missing on one side may be None on the other."""
    return "; ".join(f"{name}: {a!r} there, {b!r} given" for name, a, b in differing(there, given))
