"""Data sets of the hub, or of a local folder laid out like one, as tables."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from guided_dropout.data.tables import Table, check_columns
from guided_dropout.errors import DataError


def read_hub_table(
    repository: str, config: str | None, split: str, wanted: Sequence[str], *, advice: str = "check their names"
) -> Table:
    """Read some columns of one split.

    Args:
        repository: ``owner/name`` or a folder.
        config: name of the data set's configuration; None where it has one only.
        split: name of the split there.
        wanted: names of the columns.
        advice: what to do where a column is missing.

    Raises:
        DataError: `datasets` is not installed, no such data set, split or column.
    """
    where = "/".join(filter(None, (repository, config, split)))
    with _datasets(repository, f"{config}/{split}" if config else split) as datasets:
        table = datasets.load_dataset(repository, config, split=split)
    check_columns(table.column_names, wanted, where, advice)
    classes = {
        name: tuple(table.features[name].names)
        for name in wanted
        if isinstance(table.features[name], datasets.ClassLabel)
    }
    columns = {name: list(table[name]) for name in wanted}
    return Table(where, columns, range(len(table)), by_line=False, classes=classes)


def hub_split_names(repository: str, config: str | None) -> list[str]:
    """Names of a data set's splits; see `read_hub_table`."""
    with _datasets(repository, config or "the splits") as datasets:
        return list(datasets.get_dataset_split_names(repository, config))


@contextlib.contextmanager
def _datasets(repository: str, what: str) -> Iterator[Any]:
    """Within, the `datasets` module without its progress bars, and its errors in the user's terms."""
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ModuleNotFoundError as e:
        raise DataError(
            f"reading {repository} needs the `datasets` package: pip install 'guided-dropout[hub]', "
            "or give --data files of your own or a GLUE folder"
        ) from e
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield datasets
    except (OSError, ValueError, KeyError, DatasetsError) as e:
        lines = [line.strip().rstrip(".") for line in str(e).strip().splitlines()] or [type(e).__name__]
        # Without a configuration the second line lists those there are.
        reason = ": ".join(lines[:2]) if lines[0].startswith("Config name is missing") else lines[0]
        raise DataError(
            f"cannot read {what} of {repository} ({reason}); expected a data set of the hub, or a folder laid out like "
            "one: check the name and the connection, or give --data a GLUE folder"
        ) from e
    finally:
        if shown:
            datasets.enable_progress_bars()
