"""The rows as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.architectures.fisher import EXACT
from benchmarks.architectures.models import KINDS

KIND, SCHEMA = "architectures", 1
COMMAND = "python -m benchmarks.architectures"
Row = Mapping[str, Any]
_FISHER = {
    "wrong": "Fisher wrong",
    "refused": "Fisher refused",
    "failed": "Fisher failed (an error that is not ours, or the time limit)",
    "not run": "The plain loop does not run on token ids alone: nothing to compare with",
}
_DROPOUT = {
    "wrong": "Rates that do not arrive, or a model that does not come back",
    "refused": "Dropout refused",
    "failed": "Dropout failed",
    "not run": "Do not run in training mode on token ids alone",
}


def fisher_status(row: Row) -> str:
    """What became of the Fisher."""
    return "not built" if "not_built" in row else row["fisher"]["status"]


def dropout_status(row: Row) -> str:
    """What became of the rates."""
    return "not built" if "not_built" in row else row.get("dropout", {}).get("status", "failed")


def summary(record: Mapping[str, Any]) -> str:
    """The page."""
    rows: Sequence[Row] = record["rows"]
    lines = ["# Which model types it works on", ""]
    if not rows:
        return "\n".join([*lines, "Nothing has been measured yet."]) + "\n"
    lines += [
        "Of each type that transformers' auto classes know, a tiny model with random weights. Its Fisher is estimated",
        "in batches of three samples of mixed lengths and compared, tensor by tensor (mean over its elements), with a",
        f"plain loop over the samples alone: exact to {EXACT['float64']:.0e} in float64, or to {EXACT['float32']:.0e}",
        "in float32 where the model does not run in float64 (where it casts its logits to float32 itself, as most",
        "causal models do, both sides have some 1e-7). Tensors whose gradient is zero but for rounding, seen by the",
        "loss times 0.7, are left out. Each dropout site gets a rate of its own, which has to arrive in the arguments",
        "of a dropout or attention call; afterwards all tensors, the configuration and each module's flags and rates",
        "have to be those from before, bit for bit.",
        "",
        f"`{COMMAND}`, from the top of the checkout; stopped and started again, it goes on.",
        "",
        *_made(record),
        "",
        *_fisher_table(rows),
        "",
        *_dropout_table(rows),
    ]
    built = [row for row in rows if "not_built" not in row]
    for status, title in _FISHER.items():
        lines += _list(title, [(row, _fisher_reason(row)) for row in built if fisher_status(row) == status])
    slow = [row for row in built if row["fisher"].get("loop")]
    lines += _list(
        "Parameters that take the loop",
        [(r, f"{1 - r['fisher']['parameters_by_rule']:.1%}: {'; '.join(r['fisher']['loop'])}") for r in slow],
    )
    for status, title in _DROPOUT.items():
        lines += _list(title, [(row, _dropout_reason(row)) for row in built if dropout_status(row) == status])
    lines += _list("Changed by the estimate", [(r, ", ".join(c)) for r in built if (c := r["fisher"].get("changed"))])
    lines += _list("Not built", [(row, row["not_built"]) for row in rows if "not_built" in row])
    return "\n".join(lines) + "\n"


def _made(record: Mapping[str, Any]) -> Iterator[str]:
    made: dict[str, list[Row]] = {}
    for row in record["rows"]:
        session = record["sessions"][row["session"]]
        versions = f"torch {session['versions']['torch']}, transformers {session['versions']['transformers']}"
        made.setdefault(f"{versions}, Python {session['python']}, {session['platform']}", []).append(row)
    for text, rows in made.items():
        dates = sorted(record["sessions"][row["session"]]["date"][:10] for row in rows)
        seconds = sum(row["seconds"] for row in rows) / len(rows)
        yield f"{len(rows)} types with {text}; {dates[0]} to {dates[-1]}; {seconds:.1f} s a type."


def _fisher_table(rows: Sequence[Row]) -> Iterator[str]:
    yield "| Fisher | known | built | exact | of these in float32 | worst | wrong | refused | failed | does not run |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for title, known, mine in _by_kind(rows):
        count = _counter(mine, fisher_status)
        exact = [row["fisher"] for row in mine if fisher_status(row) == "exact"]
        worst = max((f["worst"] for f in exact if f["dtype"] == "float64"), default=None)
        cells = [known, len(mine) - count("not built"), len(exact), sum(f["dtype"] == "float32" for f in exact)]
        cells += ["" if worst is None else f"{worst:.1e}"]
        cells += [count(status) for status in ("wrong", "refused", "failed", "not run")]
        yield f"| {title} | {' | '.join(map(str, cells))} |"


def _dropout_table(rows: Sequence[Row]) -> Iterator[str]:
    yield "| dropout | with sites | sites | arrive and come back | wrong | refused | failed | no sites | does not run |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for title, _, mine in _by_kind(rows):
        count = _counter(mine, dropout_status)
        sites = [n for row in mine if (n := row.get("dropout", {}).get("sites"))]
        cells = [len(sites), sum(sites), *map(count, ("arrives", "wrong", "refused", "failed", "none", "not run"))]
        yield f"| {title} | {' | '.join(map(str, cells))} |"


def _by_kind(rows: Sequence[Row]) -> Iterator[tuple[str, int, list[Row]]]:
    for name, kind in KINDS.items():
        if mine := [row for row in rows if row["kind"] == name]:
            yield kind.title, len(kind.types), mine


def _counter(rows: Sequence[Row], status: Any) -> Any:
    found = [status(row) for row in rows]
    return found.count


def _fisher_reason(row: Row) -> str:
    fisher = row["fisher"]
    if fisher["status"] == "wrong":
        error = fisher["worst"]
        return f"`{fisher['tensor']}` is {'missing or not finite' if error is None else f'off by {error:.1e}'}"
    return fisher["message"] + (f" — the estimator {fisher['estimator']}" if "estimator" in fisher else "")


def _dropout_reason(row: Row) -> str:
    found = row.get("dropout", {})
    if "message" in found:
        return found["message"]
    facts = {"unheard": "not heard", "strays": "from nowhere", "changed": "changed"}
    return "; ".join(f"{text}: {', '.join(map(str, found[key]))}" for key, text in facts.items() if found.get(key))


def _list(title: str, entries: Iterable[tuple[Row, str]]) -> Iterator[str]:
    entries = list(entries)
    if entries:
        yield from ("", f"## {title}", "")
    for row, reason in entries:
        yield f"- {row['type']} ({KINDS[row['kind']].title}): {reason}"
