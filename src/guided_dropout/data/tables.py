"""Tables: CSV, TSV, JSON lines and Parquet files → named columns whose rows know their place."""

from __future__ import annotations

import csv
import glob
import io
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guided_dropout.artefacts import names_once
from guided_dropout.compression import SUFFIXES, UNREADABLE, open_bytes
from guided_dropout.errors import DataError

KINDS = (".csv", ".tsv", ".jsonl", ".parquet")
HALF_CHARACTER = re.compile("[\ud800-\udfff]")
"""What JSON and Python let pass in a string, and UTF-8 and tokenizers do not."""


@dataclass(frozen=True)
class Table:
    """Columns of the same length.

    Attributes:
        source: where they come from, for people.
        columns: values by the column's name.
        places: for each row the number of the line on which it begins, or its own number, from 0.
        by_line: which of the two.
        classes: for columns that hold class indices, the names of the classes.
        left_out: how many lines were left out for their number of fields.
    """

    source: str
    columns: Mapping[str, Sequence[Any]]
    places: Sequence[int]
    by_line: bool = True
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.places)

    def where(self, row: int) -> str:
        """A row's place, for people: ``"train.csv:17"`` is a line, ``"train.parquet[16]"`` a row."""
        place = self.places[row]
        return f"{self.source}:{place}" if self.by_line else f"{self.source}[{place}]"


def table_kind(path: str | Path) -> str | None:
    """The ending in `KINDS` of a file's name, which may be compressed (``.csv.gz``, ``.csv.xz``); None of any other."""
    path = Path(path)
    kind = (Path(path.stem) if path.suffix in SUFFIXES else path).suffix.lower()
    packed_parquet = kind == ".parquet" and path.suffix in SUFFIXES
    return kind if kind in KINDS and not packed_parquet else None


def table_files(path: str | Path) -> list[Path]:
    """The file of that name, or all that match a pattern such as ``part-*.csv``, by name.

    Raises:
        DataError: nothing matches the pattern.
    """
    path = Path(path).expanduser()
    if path.exists() or not any(c in str(path) for c in "*?["):
        return [path]
    found = sorted(Path(name) for name in glob.glob(str(path)))
    if not found:
        raise DataError(f"no file matches {path}; expected at least one: check the pattern")
    return found


def read_table(file: str | Path, wanted: Sequence[str], *, advice: str = "check their names") -> Table:
    """Read some columns of a file whose ending says what it is.

    CSV has commas, and quotation marks around what holds commas, quotation marks (doubled) or line ends. TSV has tabs,
    and quotation marks are text. Both begin with the names of the columns. JSON lines have an object a line.

    Args:
        file: UTF-8, but for Parquet; text formats may be ``.gz`` or ``.xz``.
        wanted: names of the columns.
        advice: what to do where a column is missing.

    Raises:
        DataError: not readable, a column that is missing, or a malformed line, named by file and number.
    """
    file, kind = Path(file), table_kind(file)
    if kind is None:
        raise DataError(f"{file} is no table; expected a file that ends with {', '.join(KINDS)}")
    if kind == ".parquet":
        return _read_parquet(file, wanted, advice)
    if kind == ".tsv":
        return read_tsv(file, wanted, advice=advice)
    if kind == ".csv":
        return _from_cells(file, iter(_csv_rows(file)), None, wanted, advice)
    return _read_jsonl(file, wanted, advice)


def read_tsv(
    file: Path,
    wanted: Sequence[str],
    names: Sequence[str] | None = None,
    *,
    advice: str = "check their names",
    broken_lines: bool = False,
) -> Table:
    """Read some columns of a tab-separated file; see `read_table`.

    Args:
        file: likewise.
        wanted: likewise.
        names: of all columns, where the first line does not hold them.
        advice: likewise.
        broken_lines: leave out lines of another number of fields, and count them; otherwise they are an error.
    """
    rows = ((number, line.split("\t")) for number, line in enumerate(_lines(file), start=1))
    return _from_cells(file, rows, names, wanted, advice, broken_lines=broken_lines)


def check_columns(found: Collection[str], wanted: Iterable[str], where: str, advice: str) -> None:
    """Make sure that each column is there, once.

    Raises:
        DataError: it is not.
    """
    for name in wanted:
        number = list(found).count(name)
        if number != 1:
            twice = "once" if number else f"one named {name!r}"
            raise DataError(f"{where}: found columns {', '.join(found)!r}; expected {twice}: {advice}")


def _from_cells(
    file: Path,
    rows: Iterator[tuple[int, list[str]]],
    names: Sequence[str] | None,
    wanted: Sequence[str],
    advice: str,
    *,
    broken_lines: bool = False,
) -> Table:
    names = next(rows, (1, []))[1] if names is None else names
    check_columns(names, wanted, f"{file}:1", advice)
    picked = [(names.index(name), []) for name in wanted]
    places, left_out = [], 0
    for number, cells in rows:
        if len(cells) != len(names):
            if broken_lines:
                left_out += 1
                continue
            raise DataError(
                f"{file}:{number}: found {len(cells)} fields; expected {len(names)}: mend or remove the line"
            )
        places.append(number)
        for place, values in picked:
            values.append(cells[place])
    columns = dict(zip(wanted, (values for _, values in picked), strict=True))
    return Table(str(file), columns, places, left_out=left_out)


def _text(file: Path) -> str:
    try:
        with open_bytes(file) as f:
            return f.read().decode("utf-8-sig")  # Windows programs, and some copies of MRPC, begin with a mark
    except (*UNREADABLE, UnicodeDecodeError) as e:
        reason = getattr(e, "strerror", None) or e
        raise DataError(f"cannot read {file} ({reason}); expected UTF-8 text: check the path and the file") from e


def _lines(file: Path) -> list[str]:
    # Not splitlines: texts hold characters that Unicode calls line ends.
    text = _text(file).replace("\r\n", "\n").removesuffix("\n")
    return text.split("\n") if text else []


def _csv_rows(file: Path) -> list[tuple[int, list[str]]]:
    text, first = _text(file), 1
    rows = []
    limit = csv.field_size_limit()
    csv.field_size_limit(max(limit, len(text) + 1))  # of the process; a document may be longer than 128 KiB
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for cells in reader:
            rows.append((first, cells))
            first = reader.line_num + 1
    except csv.Error as e:
        raise DataError(
            f"{file}:{first}: {e}; expected commas between fields, and quotation marks closed, and doubled within a "
            "field: mend or remove the line"
        ) from e
    finally:
        csv.field_size_limit(limit)
    return rows


def _read_jsonl(file: Path, wanted: Sequence[str], advice: str) -> Table:
    columns: dict[str, list[Any]] = {name: [] for name in wanted}
    lines = _lines(file)
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line, object_pairs_hook=names_once)
        except (ValueError, RecursionError) as e:  # too many digits or brackets are JSON, but not to Python
            reason = getattr(e, "msg", e)
            raise DataError(
                f"{file}:{number}: not valid JSON ({reason}); expected an object: mend or remove the line"
            ) from e
        if not isinstance(row, dict):
            raise DataError(f"{file}:{number}: found {line[:40]!r}; expected an object: mend or remove the line")
        check_columns(row, wanted, f"{file}:{number}", advice)
        for name, values in columns.items():
            if isinstance(row[name], str) and (half := HALF_CHARACTER.search(row[name])):
                raise DataError(
                    f"{file}:{number}: found {half[0]!r}, half a character, in {name!r}; expected whole ones: mend or "
                    "remove the line"
                )
            values.append(row[name])
    return Table(str(file), columns, range(1, len(lines) + 1))


def _read_parquet(file: Path, wanted: Sequence[str], advice: str) -> Table:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as e:
        raise DataError(
            f"reading {file} needs the `pyarrow` package: pip install 'guided-dropout[hub]', or give a CSV file"
        ) from e
    try:
        with pyarrow.parquet.ParquetFile(file) as f:
            check_columns(f.schema_arrow.names, wanted, str(file), advice)
            table = f.read(columns=list(wanted))
    except (OSError, pyarrow.ArrowException) as e:
        reason = str(e).strip().splitlines()[0].rstrip(".")
        raise DataError(f"cannot read {file} ({reason}); expected a Parquet file: check the path and the file") from e
    columns = {name: table.column(name).to_pylist() for name in wanted}
    return Table(str(file), columns, range(table.num_rows), by_line=False)
