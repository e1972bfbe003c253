"""Which columns of a table hold the texts and the label, and which classes there are."""

from __future__ import annotations

import csv
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from guided_dropout.data.tables import Table
from guided_dropout.errors import DataError

FORM = "text=NAME or text=NAME,NAME, then :label=NAME for classes or :score=NAME for a regression"
# More classes than this, and more than half as many as examples: the column is an index or a score.
_MANY_CLASSES = 100
_INTEGER = r"[+-]?[0-9]+"
# What pandas and NumPy make of a missing value when they write it as text.
_MISSING = ("nan", "NaN", "None", "<NA>", "NaT")


@dataclass(frozen=True)
class Columns:
    """Where the examples stand in a table.

    Attributes:
        texts: names of the one or two text columns.
        label: name of the column with the class, or with the score.
        regression: whether that is a score.

    Raises:
        DataError: not one or two texts, or a column used twice.
    """

    texts: tuple[str, ...]
    label: str
    regression: bool = False

    def __post_init__(self) -> None:
        if len(self.texts) not in (1, 2) or len(set(self.names)) != len(self.names) or not all(self.names):
            raise DataError(f"columns {', '.join(self.names)}; expected one or two texts and a label, all different")

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.texts, self.label)

    def __str__(self) -> str:
        return f"text={','.join(self.texts)}:{'score' if self.regression else 'label'}={self.label}"

    @classmethod
    def parse(cls, text: str) -> Columns:
        """Read ``"text=premise,hypothesis:label=gold"``, or ``"text=sentence:score=stars"`` for a regression.

        Names that hold commas stand in double quotation marks.

        Raises:
            DataError: anything else.
        """
        parts = re.split(r"(?:^|:)(text|label|score)=", text)
        given = dict(zip(parts[1::2], parts[2::2], strict=True))
        if parts[0] or len(given) != len(parts) // 2 or len(given) != 2 or "text" not in given:
            raise DataError(f"--columns {text!r}; expected {FORM}")
        (texts,) = csv.reader([given["text"]])
        return cls(tuple(texts), given.get("label") or given.get("score", ""), "score" in given)


def find_classes(tables: Sequence[Table], column: str) -> tuple[str, ...]:
    """Names of all classes in a column, sorted; by their value where all are integers.

    Raises:
        DataError: a value that is no class, or a column that looks like no classes at all.
    """
    names = [class_name(value, t.where(i)) for t in tables for i, value in enumerate(t.columns[column])]
    found, source = set(names), ", ".join(t.source for t in tables[:3])
    integers = all(re.fullmatch(_INTEGER, name) for name in found)
    many = len(found) > _MANY_CLASSES and 2 * len(found) > len(names)
    if many or (not integers and all(map(_is_number, found))):
        what = f"{len(found):,} different labels in {len(names):,} examples" if many else "numbers with fractions"
        shown = min(name for name in found if many or not re.fullmatch(_INTEGER, name))
        raise DataError(
            f"{source}: found {what} in {column!r}, such as {shown!r}; expected classes: name another column, or "
            f"state a regression, :score={column} in --columns"
        )
    if integers and len({int(name) for name in found}) < len(found):
        first, second = next((a, b) for a, b in itertools.combinations(sorted(found), 2) if int(a) == int(b))
        raise DataError(
            f"{source}: found the labels {first!r} and {second!r} in {column!r}; expected one spelling of each class: "
            "write a number in one way"
        )
    if len(found) < 2:
        shown = f"one class, {names[0]!r}," if found else "no examples"
        raise DataError(f"{source}: found {shown} in {column!r}; expected at least two classes to tell apart")
    return tuple(sorted(found, key=lambda name: (int(name), name)) if integers else sorted(found))


def missing_labels(tables: Sequence[Table], column: str) -> list[str]:
    """A note on each class whose name stands for a missing value elsewhere."""
    values = [value.strip() for t in tables for value in t.columns[column] if isinstance(value, str)]
    source = ", ".join(t.source for t in tables[:3])
    return [
        f"{source}: {values.count(name):,} labels are {name!r}, taken for a class of that name: remove these examples "
        "if their label is missing"
        for name in _MISSING
        if name in values
    ]


def class_reader(classes: Sequence[str]) -> Callable[[Any, str], int]:
    """Reads a label, given with its place, as the index of its class."""
    indices = {name: i for i, name in enumerate(classes)}

    def read(value: Any, where: str) -> int:
        name = class_name(value, where)
        if name not in indices:
            known = ", ".join(classes[:10]) + (", …" if len(classes) > 10 else "")
            raise DataError(
                f"{where}: found label {name!r}; expected one of the training data's, {known}: mend or remove it"
            )
        return indices[name]

    return read


def class_name(value: Any, where: str) -> str:
    """A class as files spell it: a string, a whole number (``1`` of ``1.0``), true or false.

    Raises:
        DataError: none of them.
    """
    if isinstance(value, str) and (name := value.strip()):
        return re.sub(r"(?<=[0-9])\.0+$", "", name) if re.fullmatch(r"[+-]?[0-9]+\.0+", name) else name
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else repr(value)
    raise DataError(f"{where}: found label {value!r}; expected a class by name or number: mend or remove the example")


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
