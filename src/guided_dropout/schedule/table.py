"""Reading rates that somebody wrote by hand: JSON or CSV, path → rate."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from guided_dropout.artefacts import parse_json
from guided_dropout.errors import ArtefactError, ScheduleError
from guided_dropout.schedule.shapes import check_rate


def read_rates(path: str | Path) -> dict[str, float]:
    """Path of each site → its rate, as a file gives them.

    Args:
        path: ``.json``: one object, ``{"encoder.layer.0.output.dropout": 0.1, …}``. ``.csv``: two columns, the path and
            the rate, with or without a line of headings (``path,rate``; no dot in the first, no digit in the second).

    Raises:
        ArtefactError: no such file, another ending, or not in that form; a CSV's line is named, and so is a path that
            stands twice in JSON.
        ScheduleError: a rate that is not a number in [0, 1), a path that stands twice in CSV, or no rates.
    """
    path = Path(path)
    readers = {".json": _from_json, ".csv": _from_csv}
    if path.suffix.lower() not in readers:
        raise ArtefactError(f"{path} is neither .json nor .csv; expected a table of path and rate in one of the two")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as e:
        raise ArtefactError(
            f"cannot read {path}: {getattr(e, 'strerror', None) or e}; expected a table of rates"
        ) from e
    rates: dict[str, float] = {}
    for site, rate in readers[path.suffix.lower()](path, text):
        if isinstance(rate, dict | list):
            kind = "an object" if isinstance(rate, dict) else "an array"
            raise ScheduleError(
                f'{path} gives {site} {kind}; expected a number in [0, 1), as in {{"{site}": 0.1}}: give each site its '
                "rate, by its whole path"
            )
        check_rate(site, rate)
        if site in rates:
            raise ScheduleError(f"{path} gives {site} twice; expected one rate a site")
        rates[site] = rate
    if not rates:
        raise ScheduleError(
            f"{path} gives no rates; expected one for each dropout site: `guided-dropout inspect` lists them"
        )
    return rates


def _from_json(path: Path, text: str) -> Iterable[tuple[str, Any]]:
    try:
        rates = parse_json(text)
    except ValueError as e:
        raise ArtefactError(f"{path} is not valid JSON ({e}); expected an object of path and rate") from e
    if not isinstance(rates, dict):
        raise ArtefactError(f"{path} holds no object; expected one of path and rate")
    if "kind" in rates:
        raise ArtefactError(
            f"{path} holds {rates['kind']!r}; expected a plain object of path and rate: a dropout-schedule file "
            "is used as it is"
        )
    return rates.items()


def _from_csv(path: Path, text: str) -> Iterable[tuple[str, Any]]:
    for number, row in enumerate(csv.reader(text.splitlines()), start=1):
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        try:
            site, rate = cells[0], float(cells[1])
        except (ValueError, IndexError):
            if number == 1 and _are_headings(cells):
                continue
            or_headings = ", or headings such as path,rate" if number == 1 else ""
            raise ArtefactError(
                f"{path}:{number}: found {','.join(row)!r}; expected a path, a comma, a rate{or_headings}"
            ) from None
        if len(cells) != 2 or not site:
            raise ArtefactError(f"{path}:{number}: found {','.join(row)!r}; expected a path, a comma, a rate")
        yield site, rate


def _are_headings(cells: Sequence[str]) -> bool:
    """Whether a first line names its columns; a site whose rate is mistyped (``O.1``, ``0,1``, nothing) is none."""
    return len(cells) == 2 and "." not in cells[0] and bool(cells[1]) and not any(c.isdigit() for c in cells[1])
