"""``python -m benchmarks.architectures``: the Fisher and dropout of every model type transformers knows; resumable.

    python -m benchmarks.architectures                                  # all that is missing
    python -m benchmarks.architectures --kinds causal --types llama gpt2 --again

One JSON file with a row for each kind and type, written after each of them, and a summary. Rows that were made with the
same versions of the packages stay; ``--again`` makes those that are asked for anew, which is what a change of the code
between two versions needs.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.architectures.measure import measured
from benchmarks.architectures.models import KINDS
from benchmarks.architectures.summary import KIND, SCHEMA, dropout_status, fisher_status, summary
from guided_dropout.artefacts import read_json, write_json, write_text
from guided_dropout.provenance import provenance

RESULTS = Path(__file__).resolve().parents[1] / "results" / "architectures"


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.architectures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    p.add_argument("--types", nargs="+", metavar="TYPE", help="by default all that transformers knows of these kinds")
    p.add_argument("--again", action="store_true", help="make the rows that are asked for anew")
    p.add_argument("--limit", type=float, default=120.0, help="seconds a type may take")
    p.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    p.add_argument("--summary", action="store_true", help="only write the summary of what there is")
    args = p.parse_args(argv)
    known = {name for kind in args.kinds for name in KINDS[kind].types}
    if strange := sorted(set(args.types or ()) - known):
        p.error(f"--types {strange[0]}; expected types that transformers knows as {' or '.join(args.kinds)}")
    wanted = [
        (kind, name) for kind in args.kinds for name in KINDS[kind].types if args.types is None or name in args.types
    ]
    record = _record(args.out / "rows.json")
    if not args.summary:
        measure(record, wanted, args.out / "rows.json", again=args.again, limit=args.limit)
    write_text(args.out / "README.md", summary(record))
    print(args.out / "README.md")


def measure(
    record: dict[str, Any], wanted: list[tuple[str, str]], path: Path, *, again: bool = False, limit: float = 120.0
) -> None:
    """Add the rows that are missing to the record, and write it after each."""
    session = provenance()
    rows = {(row["kind"], row["type"]): row for row in record["rows"]}
    if not again:
        kept = {key for key, row in rows.items() if _same(record["sessions"][row["session"]], session)}
        wanted = [key for key in wanted if key not in kept]
    if not wanted:
        return
    record["sessions"].append(session)
    order = {(kind, name): i for i, key in enumerate(KINDS) for kind, name in ((key, n) for n in KINDS[key].types)}
    for done, (kind, name) in enumerate(wanted, 1):
        row = {**measured(kind, name, limit=limit), "session": len(record["sessions"]) - 1}
        rows[kind, name] = row
        record["rows"] = sorted(rows.values(), key=lambda r: (order.get((r["kind"], r["type"]), -1), r["type"]))
        write_json(path, record)
        text = f"Fisher {fisher_status(row)}, dropout {dropout_status(row)}" if "class" in row else "not built"
        print(f"{done} of {len(wanted)} {kind} {name}: {text}, {row['seconds']} s", flush=True)


def _record(path: Path) -> dict[str, Any]:
    if path.exists():
        return read_json(path, kind=KIND, schema=SCHEMA)
    return {"kind": KIND, "schema": SCHEMA, "sessions": [], "rows": []}


def _same(there: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    return there["versions"] == here["versions"] and there["python"] == here["python"]


if __name__ == "__main__":
    main()
