"""What an experiment shows: its claims in words, tables of verdicts, and all figures of all comparisons."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from guided_dropout.bench import controls
from guided_dropout.bench.analysis import Analysis, Comparison, Guidance
from guided_dropout.bench.csv_files import OVERALL
from guided_dropout.bench.document import Block, Bullets, Details, Heading, Paragraph, Table
from guided_dropout.bench.phrases import (
    NOTHING,
    capital,
    cell_text,
    count,
    guidance_sentence,
    listing,
    of_the_data,
    overview_sentence,
)
from guided_dropout.bench.sections import Difference, difference_table, how_to_read

_OTHERS = "Other guided arms"
# Guidance may help and dropout harm all the same: so no dropout has a sentence of its own.
_AGAINST = {"dropout": "Against standard dropout", "none": "Against no dropout"}


def claims(analysis: Analysis, arms: Sequence[str] | None = None) -> Iterator[str]:
    """What the experiment shows of guided arms, some paragraphs for each model and fraction.

    Args:
        analysis: of the runs.
        arms: labels of guided arms; the main one if None.
    """
    arms = [a for a in analysis.arms if a == analysis.main] if arms is None else arms
    for model in analysis.models:
        for fraction in analysis.fractions:
            for arm in arms:
                place = place_name(analysis, model, fraction)
                about = [c for c in analysis.comparisons
                         if (c.model, c.fraction, c.pair.a) == (model, fraction, arm)]  # fmt: skip
                for name, title in _AGAINST.items():
                    for control in dict.fromkeys(c.pair.b for c in about if controls.name_of(c.pair.b) == name):
                        pairs = [c for c in about if c.pair.b == control]
                        found = overview_sentence(pairs, _overall(analysis, pairs[0]), 1 - analysis.confidence)
                        yield f"{place}. {title}. {found}"
                if about:
                    yield f"{place}. {_about_guidance(analysis, model, fraction, arm)}"


def verdicts(analysis: Analysis) -> list[Block]:
    """The claims, and tables of all verdicts."""
    blocks: list[Block] = [Heading("What it shows")]
    texts = list(claims(analysis))
    if not texts:
        nothing = Paragraph("No guided arm has been run beside another, so nothing is compared.")
        return [*blocks, nothing, *_untrained(analysis)]
    blocks += [Paragraph(text, strong=True) for text in texts] if len(texts) <= 6 else [Bullets(texts)]
    blocks += _tables(analysis)
    return [*blocks, _rules(analysis), *_untrained(analysis)]


def _rules(analysis: Analysis) -> Paragraph:
    margin = analysis.margin
    equal = (
        "No difference is never claimed, because no margin was given that would not matter"
        if margin is None
        else f"No difference: the interval includes zero and lies within ±{margin:g}"
    )
    chance = round(1 / (1 - analysis.confidence))
    return Paragraph(
        f"Helps or hurts: the {analysis.confidence:.0%} t interval of the paired differences excludes zero. {equal}. "
        "Undecided: anything else at this number of seeds. † holds after Holm's correction over the tasks of that "
        f"row's model and fraction; without it, about one in {chance} comparisons excludes zero by chance. The mean "
        "over tasks takes each seed's mean of the tasks' metrics, whatever these measure, as the GLUE score does."
    )


def _untrained(analysis: Analysis) -> list[Block]:
    """A warning where half of the runs or more learned nothing, of all or of an arm."""
    places, arms = [], []
    for cell in analysis.cells.values():
        place = f"{cell.task} ({place_name(analysis, cell.model, cell.fraction)})"
        collapsed = sum(arm.collapsed for arm in cell.arms.values())
        if 2 * collapsed >= sum(arm.made for arm in cell.arms.values()):
            places.append(place)
        elif mostly := [name for name, arm in cell.arms.items() if 2 * arm.collapsed >= arm.made]:
            arms.append(f"of {listing(mostly)} on {place}")
    return [
        Paragraph(
            f"Half of the runs or more collapsed{found}. There, a difference is about whether training works at all, "
            "and the lack of one says little.",
            strong=True,
        )
        for found in ([f" on {listing(places)}"] if places else []) + ([f", {'; '.join(arms)}"] if arms else [])
    ]


def comparisons(analysis: Analysis) -> list[Block]:
    """All figures of all comparisons, folded away by task."""
    if not analysis.comparisons:
        return []
    blocks: list[Block] = [Heading("All comparisons"), how_to_read(corrected=True)]
    for task in (*analysis.tasks, None):
        held = [c for c in (*analysis.comparisons, *analysis.overall) if c.task == task]
        if not held:
            continue
        held.sort(key=lambda c: (analysis.models.index(c.model), -c.fraction))
        rows = [
            Difference(
                [*place_cells(analysis, c.model, c.fraction, c.task)[:-1], f"{c.pair.a} − {c.pair.b}", c.role],
                c.pair, c.verdict, None if task is None else (c.t_holm, c.wilcoxon_holm),
            )
            for c in held
        ]  # fmt: skip
        head = [*place_head(analysis)[:-1], "difference", "the second is"]
        table = difference_table(head, rows, analysis.confidence)
        blocks.append(Details(f"{task or OVERALL}: {count(len(rows), 'comparison')}", [table]))
    notes = dict.fromkeys(
        note for c in analysis.comparisons if c.pair.statistics for note in c.pair.statistics.notes
    )  # fmt: skip
    return [*blocks, *([Bullets(list(notes))] if notes else [])]


def _about_guidance(analysis: Analysis, model: str, fraction: float, arm: str) -> str:
    held = [g for g in analysis.guidance if (g.model, g.fraction, g.guided) == (model, fraction, arm)]
    overall = next((g for g in held if g.task is None), None)
    if overall is None:
        sentences = dict.fromkeys(guidance_sentence(g) for g in held)
        if len(sentences) == 1:
            return next(iter(sentences))
        return " ".join(f"{g.task}: {guidance_sentence(g)}" for g in held)
    tasks = [g for g in held if g.task is not None]
    means = {
        c.tasks for c in analysis.overall if c.same_mean and (c.model, c.fraction, c.pair.a) == (model, fraction, arm)
    }
    over = " to ".join(map(str, sorted({min(means), max(means)}))) if means else str(len(tasks))
    return f"Mean over {over} tasks. {guidance_sentence(overall)}{_task_by_task(tasks)}"


def _task_by_task(held: Sequence[Guidance]) -> str:
    by_verdict = defaultdict(list)
    for g in held:
        if g.by_verdict and not g.lacking:
            by_verdict[g.verdict].append(g.task)
    found = "; ".join(f"{v} on {listing(tasks)}" for v, tasks in by_verdict.items())
    return f" Task by task: {found}." if found else ""


def _overall(analysis: Analysis, one: Comparison) -> Comparison | None:
    wanted = (one.model, one.fraction, one.pair.a, one.pair.b)
    return next((c for c in analysis.overall if (c.model, c.fraction, c.pair.a, c.pair.b) == wanted), None)


def _tables(analysis: Analysis) -> list[Block]:
    """Mean difference and verdict: a row for each task and fraction, a column for each pair of arms."""
    main = analysis.main
    held = [*analysis.comparisons, *analysis.overall]
    parts = {
        f"{main} against standard dropout, its controls and no dropout": [
            c for c in held if c.pair.a == main and c.role != controls.OTHER
        ],
        f"{main} against other regularizers": [c for c in held if c.pair.a == main and c.role == controls.OTHER],
        _OTHERS: [c for c in held if c.pair.a != main],
    }
    blocks = [block for title, part in parts.items() if part for block in (Heading(title, 3), _table(analysis, part))]
    others = [a for a in analysis.arms if controls.name_of(a) in controls.GUIDED and a != main]
    return [*blocks, *([Bullets(list(claims(analysis, others)))] if parts[_OTHERS] else [])]


def _table(analysis: Analysis, held: Sequence[Comparison]) -> Table:
    pairs = defaultdict(list)
    for c in held:
        pairs[c.pair.a, c.pair.b].append(c)
    by_place = {(c.model, c.fraction, c.task, c.pair.a, c.pair.b): c for c in held}
    rows = [
        [*place_cells(analysis, *place), *(_text(analysis, by_place.get((*place, *pair))) for pair in pairs)]
        for place in _places(analysis, held)
    ]
    header = [*place_head(analysis), *(_pair_head(analysis, column) for column in pairs.values())]
    return Table(header, rows, text_columns=range(len(header)))


def _pair_head(analysis: Analysis, column: Sequence[Comparison]) -> str:
    """Name of a column; whether the mean rates are the same only where all of it agrees."""
    pair, role = column[0].pair, column[0].role
    name = pair.b if pair.a == analysis.main else f"{pair.a} − {pair.b}"
    same_mean = {c.same_mean for c in column if c.pair.statistics is not None}
    standard = " (standard)" if role == controls.STANDARD and True not in same_mean else ""
    return f"{name}{' (same mean)' if same_mean == {True} else standard}"


def _places(analysis: Analysis, held: Sequence[Comparison]) -> list[tuple[str, float, str | None]]:
    there = {(c.model, c.fraction, c.task) for c in held}
    every = ((m, f, t) for m in analysis.models for f in analysis.fractions for t in (*analysis.tasks, None))
    return [place for place in every if place in there]


def _text(analysis: Analysis, c: Comparison | None) -> str:
    return NOTHING if c is None else cell_text(c, 1 - analysis.confidence)


def place_name(analysis: Analysis, model: str, fraction: float) -> str:
    """Model, where there are several, and fraction, for people."""
    return f"{model}, {of_the_data(fraction)}" if len(analysis.models) > 1 else capital(of_the_data(fraction))


def place_head(analysis: Analysis) -> list[str]:
    """Heads of a table's first columns."""
    return [*(["model"] if len(analysis.models) > 1 else []), "data", "task"]


def place_cells(analysis: Analysis, model: str, fraction: float, task: str | None) -> list[str]:
    """A table's first cells."""
    return [*([model] if len(analysis.models) > 1 else []), f"{100 * fraction:g} %", task or OVERALL]
