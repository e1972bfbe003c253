"""The results as Markdown: which bars are reached, and a table for each case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.fisher.cases import find_cases
from benchmarks.fisher.table import ENTRIES
from guided_dropout.artefacts import read_json

KIND, SCHEMA = "fisher-speed", 1
Results = dict[str, dict[str, Any]]  # method → its file


def ratio(results: Results, name: str, to: str = "floor_a") -> float | None:
    """Median of the rounds' ratios to a floor, or to this project's method, timed beside it."""
    found = results.get(name, {}).get("timing", {}).get(f"ratio_to_{to}")
    return found["median"] if found else None


def peak(results: Results, name: str) -> float | None:
    """Peak memory of a batch in MiB."""
    return results.get(name, {}).get("memory", {}).get("peak_mib")


def _quotient(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def _times_faster(*others: str) -> Callable[[Results], float | None]:
    """How many times as long the fastest of `others` takes as this project, timed beside it."""

    def measure(r: Results) -> float | None:
        return min((v for o in others if (v := ratio(r, o, "batched")) is not None), default=None)

    return measure


@dataclass(frozen=True)
class Bar:
    """What a case should reach.

    Attributes:
        text: for the reader.
        families: of the models that it is for.
        measure: results of a case → the number, or None where it was not measured.
        limit: the number to reach.
        at_least: whether larger is better.
        layers: only for models of so many blocks.
        tokens: only for samples of this length.
    """

    text: str
    families: tuple[str, ...]
    measure: Callable[[Results], float | None]
    limit: float
    at_least: bool = False
    layers: int | None = None
    tokens: int | None = None

    def is_for(self, case: dict[str, Any]) -> bool:
        """Whether it is meant for this case."""
        return (
            case["family"] in self.families
            and self.layers in (None, case["layers"])
            and self.tokens in (None, max(case["tokens"]))
        )

    def reached(self, value: float) -> bool:
        """Whether `value` is good enough."""
        return value >= self.limit if self.at_least else value <= self.limit


_BERT, _CAUSAL = ("bert",), ("gpt2", "llama")
BARS = (
    Bar("time ÷ floor A", _BERT, lambda r: ratio(r, "batched"), 0.55, layers=6),
    Bar("time ÷ floor B", _BERT, lambda r: ratio(r, "batched", "floor_b"), 1.05, layers=6),
    Bar("time ÷ floor A", _BERT, lambda r: ratio(r, "batched"), 1.0, layers=12),
    Bar("time ÷ floor A", _CAUSAL, lambda r: ratio(r, "batched"), 1.10),
    Bar("times faster than vmap", _BERT, _times_faster("vmap", "vmap-in-twos"), 2.5, True, layers=6, tokens=128),
    Bar("times faster than the published way", _BERT, _times_faster("published"), 5.0, True, layers=6, tokens=128),
    Bar("times faster than the published way, 96 at a time", _BERT, _times_faster("published-96"), 5.0, True,
        layers=6, tokens=128),
    Bar("peak memory ÷ floor B's", _BERT, lambda r: _quotient(peak(r, "batched"), peak(r, "floor-b")), 1.0, layers=6),
    Bar("scores only: time ÷ floor A", _BERT, lambda r: ratio(r, "batched-scores"), 0.45, layers=6),
    Bar("scores only: peak memory ÷ floor A's", _BERT,
        lambda r: _quotient(peak(r, "batched-scores"), peak(r, "floor-a")), 1.0, layers=6),
)  # fmt: skip


def load(folder: Path) -> dict[str, Results]:
    """Case → method → result file, in the order of the tables."""
    order = [c.name for c in find_cases(["*"])]
    found = sorted({p.parent.name for p in folder.glob("*/*.json")}, key=lambda n: (n not in order, n))
    cases = [n for n in order if n in found] + [n for n in found if n not in order]
    return {
        case: {
            e.name: read_json(path, kind=KIND, schema=SCHEMA)
            for e in ENTRIES
            if (path := folder / case / f"{e.name}.json").exists()
        }
        for case in cases
    }


def summary(folder: Path) -> str:
    """The page."""
    cases = load(folder)
    files = [r for results in cases.values() for r in results.values()]
    if not files:
        return "# Speed of the batched Fisher\n\nNothing has been measured yet.\n"
    lines = ["# Speed of the batched Fisher", "", *_made_with(files), "", "## Bars", "", *_bars(cases)]
    for name, results in cases.items():
        lines += ["", f"## {name}", "", *_table(results)]
    return "\n".join(lines) + "\n"


def _made_with(files: list[dict[str, Any]]) -> list[str]:
    hardware = " / ".join(sorted({
        f"{h['cpu']}, {h['cores']} cores, {h.get('memory_gib', '?')} GiB, "
        f"{'AVX-512' if any(f.startswith('avx512') for f in h.get('flags', ())) else 'no AVX-512'}"
        for h in (r["hardware"] for r in files)
    }))  # fmt: skip
    threads = sorted({r["timing"]["threads"] for r in files if "threads" in r.get("timing", {})})
    versions = sorted({
        f"torch {v.get('torch')}, transformers {v.get('transformers')}"
        for v in (r["provenance"]["versions"] for r in files)
    })  # fmt: skip
    dates = sorted(r["provenance"]["date"][:10] for r in files)
    days = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    revisions = sorted({str(r["revision"]) for r in files})
    loads = [
        part["load_before"] for r in files for p in ("timing", "memory") if "load_before" in (part := r.get(p, {}))
    ]
    return [
        f"{hardware}; {'/'.join(map(str, threads))} threads; {'; '.join(versions)}; {days}; "
        f"revision {', '.join(revisions)}; load average before a measurement {min(loads, default=0):.1f} to "
        f"{max(loads, default=0):.1f}. Made by `python -m benchmarks.fisher`; what is "
        "measured and how: benchmarks/fisher/README.md."
    ]


def _bars(cases: dict[str, Results]) -> list[str]:
    rows = ["| case | bar | measured | |", "|---|---|---|---|"]
    for name, results in cases.items():
        case = next(iter(results.values()))["case"]
        for bar in (b for b in BARS if b.is_for(case)):
            value = bar.measure(results)
            found = "—" if value is None else f"{value:.2f}"
            verdict = "not measured" if value is None else "reached" if bar.reached(value) else "**not reached**"
            rows.append(f"| {name} | {bar.text} {'≥' if bar.at_least else '≤'} {bar.limit:g} | {found} | {verdict} |")
    return rows


def _table(results: Results) -> list[str]:
    case = next(iter(results.values()))["case"]
    lengths = case["tokens"]
    span = f"{lengths[0]}" if min(lengths) == max(lengths) else f"{min(lengths)} to {max(lengths)}"
    rows = [
        f"{case['batch']} samples of {span} tokens, {case['targets']} targets; weights: {case['weights']}. "
        f"{_measured(results)}.",
        "",
        "| method | ms a sample [quartiles] | rounds | ÷ floor A [quart.] | ÷ floor B | ÷ ours | MiB | worst error "
        "| covered |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for name, r in results.items():
        timing, memory = r.get("timing", {}), r.get("memory", {})
        problem = timing.get("failed") or timing.get("skipped")
        took, to_a = timing.get("seconds_per_sample"), timing.get("ratio_to_floor_a")
        others = [ratio(results, name, to) for to in ("floor_b", "batched")]
        bytes_ = f"{memory['peak_mib']:.0f}" if "peak_mib" in memory else "—"
        cells = [
            f"{1000 * took['median']:.1f} [{1000 * took['q25']:.1f}, {1000 * took['q75']:.1f}]" if took else "—",
            f"{len(took['all'])}" if took else "—",
            f"{to_a['median']:.2f} [{to_a['q25']:.2f}, {to_a['q75']:.2f}]" if to_a else "—",
            *("—" if v is None else f"{v:.2f}" for v in others),
            bytes_,
            *_accuracy(r.get("accuracy")),
        ]
        if problem:
            notes.append(f"- {r['label']}: {'skipped' if 'skipped' in timing else 'failed'}: {problem}")
        elif "failed" in memory:
            notes.append(f"- {r['label']}: memory failed: {memory['failed']}")
        if not problem or "peak_mib" in memory:
            rows.append(f"| {r['label']} | {' | '.join(cells)} |")
            if r["note"] and name != "floor-a":
                notes.append(f"- {r['label']}: {r['note']}")
    return [*rows, "", *notes] if notes else rows


def _measured(results: Results) -> str:
    """On what and when: a ratio is of measurements on the same machine, another case's may be of another."""
    machines = sorted({r["hardware"]["cpu"] for r in results.values()})
    days = sorted({r["provenance"]["date"][:10] for r in results.values()})
    return f"{' / '.join(machines)}, {' to '.join(dict.fromkeys((days[0], days[-1])))}"


def _accuracy(found: dict[str, Any] | None) -> tuple[str, str]:
    if found is None:
        return "—", "—"
    if found["not_finite"]:
        return f"not finite in {len(found['not_finite'])} tensors", f"{found['covered']:.0%}"
    wrong = len(found["wrong"]["tensors"])
    where = f" ({wrong} of {found['tensors']} tensors beyond 1 %)" if wrong else ""
    worst = "—" if found["worst"] is None else f"{found['worst']:.1e}"
    return worst + where, f"{found['covered']:.0%}"
