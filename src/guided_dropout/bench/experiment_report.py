"""The report of an experiment, finished or not: verdicts, tables and figures, what went wrong, what it does not show."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from guided_dropout.artefacts import check_output_folder, staged_folder, write_text
from guided_dropout.bench import controls
from guided_dropout.bench.analysis import Analysis, Comparison, Guidance, analyse
from guided_dropout.bench.arms import STATUSES
from guided_dropout.bench.csv_files import OVERALL, write_csv
from guided_dropout.bench.document import (
    HTML_NAME,
    Block,
    Bullets,
    Code,
    Details,
    Heading,
    Paragraph,
    Table,
    write_document,
)
from guided_dropout.bench.experiment_figures import curves, forests, main_arm, run_by_run
from guided_dropout.bench.folder import Experiment, Run
from guided_dropout.bench.phrases import (
    NOTHING,
    cell_text,
    count,
    failure_line,
    guidance_sentence,
    listing,
    of_the_data,
    overview_sentence,
)
from guided_dropout.bench.restarts import restarts, to_latex
from guided_dropout.bench.sections import Difference, difference_table, facts_line, how_to_read, meaning, origins

LATEX_NAME = "tables.tex"


def report_experiment(
    path: str | Path, out: str | Path | None = None, *, margin: float | None = None, confidence: float = 0.95
) -> tuple[Analysis, list[Path]]:
    """Report on the runs of an experiment that are there.

    Args:
        path: the experiment's folder.
        out: where to write; ``report`` in the experiment's folder if None. A report that is there is replaced.
        margin: largest difference that does not matter, in the metrics' unit; see `stats.verdict`.
        confidence: of the intervals.

    Returns:
        What was found, and the paths of ``report.html``, ``report.md``, ``runs.csv``, ``arms.csv``, ``comparisons.csv``
        and ``tables.tex``.

    Raises:
        ArtefactError: `path` holds no experiment, or `out` cannot be written or holds other things.
        DataError: no runs, or runs that do not belong together.
    """
    experiment = Experiment(path)
    out = Path(path) / "report" if out is None else Path(out)
    check_output_folder(out, marker=HTML_NAME)
    analysis = analyse(experiment.runs(), experiment.grid, margin=margin, confidence=confidence)
    name = experiment.path.resolve().name
    tables = restarts(analysis)
    blocks: list[Block] = [
        Heading(f"Experiment {name}", 1),
        *_progress(analysis),
        *_verdicts(analysis),
        Heading("Maximum and mean over the restarts"),
        Paragraph("Each cell: maximum / mean over an arm's runs, as in Table 2 of the paper."),
        *(block for t in tables for block in (Heading(_place(analysis, t.model, t.fraction), 3), t.table(),
                                             *map(Paragraph, t.notes))),
        *curves(analysis),
        *forests(analysis),
        *_comparisons(analysis),
        *run_by_run(analysis),
        *_what_went_wrong(analysis),
        *_what_was_run(analysis, experiment.facts),
        *_again(analysis, experiment),
        *_limits(analysis),
    ]  # fmt: skip
    with staged_folder(out) as folder:
        written = [*write_document(folder, f"Experiment {name}", blocks), *write_csv(folder, analysis)]
        write_text(folder / LATEX_NAME, to_latex(tables, name))
        written.append(folder / LATEX_NAME)
    return analysis, [out / file.name for file in written]


def claims(analysis: Analysis) -> Iterator[str]:
    """What the experiment shows of its guided arms, a sentence or two for each model and fraction."""
    guided = [a for a in analysis.arms if controls.name_of(a) in controls.GUIDED]
    for model in analysis.models:
        for fraction in analysis.fractions:
            for arm in guided:
                where = _place(analysis, model, fraction)
                about = [c for c in analysis.comparisons
                         if (c.model, c.fraction, c.pair.a) == (model, fraction, arm)]  # fmt: skip
                for control in dict.fromkeys(c.pair.b for c in about if controls.name_of(c.pair.b) == "dropout"):
                    pairs = [c for c in about if c.pair.b == control]
                    overall = _overall(analysis, pairs[0])
                    yield f"{where}. Against standard dropout. {overview_sentence(pairs, overall, 1 - analysis.confidence)}"
                if about:
                    yield f"{where}. {_about_guidance(analysis, model, fraction, arm)}"


def _progress(analysis: Analysis) -> list[Block]:
    made, expected = len(analysis.runs), analysis.expected
    seeds = len({run.key.seed for run in analysis.runs})
    lost = Counter(run.status for run in analysis.runs)
    wrong = listing([f"{lost[s]:,} {s}" for s in STATUSES[1:] if lost[s]])
    blocks: list[Block] = []
    if expected is not None and made < expected:
        blocks.append(
            Paragraph(
                f"Not finished: {made:,} of {expected:,} runs are there. What follows is of those alone and may change.",
                strong=True,
            )
        )
    blocks.append(
        Paragraph(
            f"{count(made, 'run')}{f' of {expected:,}' if expected is not None else ''}: "
            f"{count(len(analysis.models), 'model')} ({', '.join(analysis.models)}), "
            f"{count(len(analysis.tasks), 'task')} ({', '.join(analysis.tasks)}), {count(len(analysis.arms), 'arm')}, "
            f"training on {listing([f'{100 * f:g} %' for f in analysis.fractions])} of the data, "
            f"{count(seeds, 'paired seed')}. {f'Of the runs, {wrong}.' if wrong else 'All runs ended well.'}"
        )
    )
    return blocks


def _verdicts(analysis: Analysis) -> list[Block]:
    blocks: list[Block] = [Heading("What it shows")]
    texts = list(claims(analysis))
    if not texts:
        return [*blocks, Paragraph("No guided arm has been run beside another, so nothing is compared.")]
    main = main_arm(analysis)
    first = [t for t in texts if len(texts) <= 6]
    blocks += [Paragraph(text, strong=True) for text in first] or [Bullets(texts)]
    blocks += _matrix(analysis, main) if main else []
    others = [c for c in (*analysis.comparisons, *analysis.overall) if c.pair.a != main]
    if others:
        blocks += [Heading("Other guided arms", 3), _other_matrix(analysis, others)]
    margin = analysis.margin
    equal = (
        f"no difference: the interval includes zero and lies within ±{margin:g}; "
        if margin is not None
        else "no difference is never claimed, because no margin was given that would not matter; "
    )
    blocks.append(
        Paragraph(
            f"Helps or hurts: the {analysis.confidence:.0%} t interval of the paired differences excludes zero. {equal}"
            "undecided: anything else at this number of seeds. † holds after Holm's correction over the tasks of that row's "
            "model and fraction. Without it, about one in "
            f"{round(1 / (1 - analysis.confidence))} comparisons excludes zero by chance. The mean over tasks takes each "
            "seed's mean of the tasks' metrics, whatever these measure, as the GLUE score does."
        )
    )
    return blocks


def _about_guidance(analysis: Analysis, model: str, fraction: float, arm: str) -> str:
    held = [g for g in analysis.guidance if (g.model, g.fraction, g.guided) == (model, fraction, arm)]
    overall = next((g for g in held if g.task is None), None)
    if overall is None:
        sentences = dict.fromkeys(guidance_sentence(g) for g in held)
        if len(sentences) == 1:
            return next(iter(sentences))
        return " ".join(f"{g.task}: {guidance_sentence(g)}" for g in held)
    return f"{guidance_sentence(overall)}{_task_by_task([g for g in held if g.task is not None])}"


def _task_by_task(held: Sequence[Guidance]) -> str:
    if not any(g.by_verdict for g in held) or any(g.lacking for g in held):
        return ""
    by_verdict = defaultdict(list)
    for g in held:
        by_verdict[g.verdict].append(g.task)
    return f" Task by task: {'; '.join(f'{v} on {listing(tasks)}' for v, tasks in by_verdict.items())}."


def _overall(analysis: Analysis, one: Comparison) -> Comparison | None:
    wanted = (one.model, one.fraction, one.pair.a, one.pair.b)
    return next((c for c in analysis.overall if (c.model, c.fraction, c.pair.a, c.pair.b) == wanted), None)


def _place(analysis: Analysis, model: str, fraction: float) -> str:
    return f"{model}, {of_the_data(fraction)}" if len(analysis.models) > 1 else _capital(of_the_data(fraction))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _matrix(analysis: Analysis, main: str) -> list[Block]:
    """Mean difference and verdict: a row for each task and fraction, a column for each control."""
    mine = [c for c in (*analysis.comparisons, *analysis.overall) if c.pair.a == main]
    blocks: list[Block] = []
    for title, wanted in (
        (f"{main} against standard dropout, its controls and no dropout", True),
        (f"{main} against other regularizers", False),
    ):
        held = [c for c in mine if (c.role != controls.OTHER) == wanted]
        if held:
            blocks += [Heading(title, 3), _verdict_table(analysis, held)]
    return blocks


def _verdict_table(analysis: Analysis, held: Sequence[Comparison]) -> Table:
    names = list(dict.fromkeys(c.pair.b for c in held))
    roles = {c.pair.b: c.role for c in held}
    fair = {c.pair.b for c in held if c.same_mean}
    by_place = {(c.model, c.fraction, c.task, c.pair.b): c for c in held}
    header = [*_where_head(analysis), *(_control_head(n, roles[n], n in fair) for n in names)]
    rows = []
    for m, f, t in _places(analysis, held):
        cells = (by_place.get((m, f, t, name)) for name in names)
        rows.append([*_where(analysis, m, f, t), *(_text(analysis, c) for c in cells)])
    return Table(header, rows, text_columns=range(len(header)))


def _control_head(name: str, role: str, fair: bool) -> str:
    if fair:
        return f"{name} (same mean)"
    return f"{name} (standard)" if role == controls.STANDARD else name


def _other_matrix(analysis: Analysis, held: Sequence[Comparison]) -> Table:
    pairs = dict.fromkeys((c.pair.a, c.pair.b) for c in held)
    by_place = {(c.model, c.fraction, c.task, c.pair.a, c.pair.b): c for c in held}
    header = [*_where_head(analysis), *(f"{a} − {b}" for a, b in pairs)]
    rows = [
        [*_where(analysis, *place), *(_text(analysis, by_place.get((*place, *pair))) for pair in pairs)]
        for place in _places(analysis, held)
    ]
    return Table(header, rows, text_columns=range(len(header)))


def _places(analysis: Analysis, held: Sequence[Comparison]) -> list[tuple[str, float, str | None]]:
    there = {(c.model, c.fraction, c.task) for c in held}
    every = ((m, f, t) for m in analysis.models for f in analysis.fractions for t in (*analysis.tasks, None))
    return [place for place in every if place in there]


def _where_head(analysis: Analysis) -> list[str]:
    return [*(["model"] if len(analysis.models) > 1 else []), "data", "task"]


def _where(analysis: Analysis, model: str, fraction: float, task: str | None) -> list[str]:
    return [*([model] if len(analysis.models) > 1 else []), f"{100 * fraction:g} %", task or OVERALL]


def _text(analysis: Analysis, c: Comparison | None) -> str:
    return NOTHING if c is None else cell_text(c, 1 - analysis.confidence)


def _comparisons(analysis: Analysis) -> list[Block]:
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
                [*_where(analysis, c.model, c.fraction, c.task)[:-1], f"{c.pair.a} − {c.pair.b}", c.role],
                c.pair, c.verdict, None if task is None else (c.t_holm, c.wilcoxon_holm),
            )
            for c in held
        ]  # fmt: skip
        head = [*_where_head(analysis)[:-1], "difference", "the second is"]
        table = difference_table(head, rows, analysis.confidence)
        blocks.append(Details(f"{task or OVERALL}: {count(len(rows), 'comparison')}", [table]))
    notes = dict.fromkeys(
        note for c in analysis.comparisons if c.pair.statistics for note in c.pair.statistics.notes
    )  # fmt: skip
    return [*blocks, *([Bullets(list(notes))] if notes else [])]


def _what_went_wrong(analysis: Analysis) -> list[Block]:
    by_arm: dict[str, Counter[str]] = defaultdict(Counter)
    for run in analysis.runs:
        by_arm[run.key.arm][run.status] += 1
    cells = len(analysis.models) * len(analysis.tasks) * len(analysis.fractions)
    seeds = None if analysis.expected is None else analysis.expected // (cells * len(analysis.arms))
    header = ["arm", *STATUSES, *(["not made yet"] if seeds is not None else [])]
    rows = []
    for arm in analysis.arms:
        made = by_arm[arm]
        missing = [] if seeds is None else [f"{max(0, seeds * cells - made.total()):,}"]
        rows.append([arm, *(f"{made[s]:,}" for s in STATUSES), *missing])
    blocks: list[Block] = [
        Heading("What became of the runs"),
        Table(header, rows),
        Paragraph(
            "Collapsed: all predictions are one class; such a run has a metric and counts like any other. Diverged: a loss "
            "became infinite or NaN. Failed: an error, given below. Diverged and failed runs have no metric."
        ),
    ]
    odd = _odd_cells(analysis)
    if odd.rows:
        blocks.append(Details(f"Where runs collapsed, diverged or failed: {count(len(odd.rows), 'place')}", [odd]))
    failures: dict[str, list[Run]] = defaultdict(list)
    for run in analysis.runs:
        if run.failure is not None:
            failures[failure_line(run)].append(run)
    if failures:
        table = [[line, f"{len(runs):,}", _some(runs)] for line, runs in failures.items()]
        blocks += [Heading("Failures", 3), Table(["error", "runs", "which"], table, text_columns=(0, 2))]
    return blocks


def _odd_cells(analysis: Analysis) -> Table:
    rows = []
    for cell in analysis.cells.values():
        for arm in cell.arms.values():
            if arm.counts["ok"] < arm.made:
                where = _where(analysis, cell.model, cell.fraction, cell.task)
                rows.append([*where, arm.name, *(str(arm.counts[s]) for s in STATUSES)])
    head = _where_head(analysis)
    return Table([*head, "arm", *STATUSES], rows, text_columns=range(len(head) + 1))


def _some(runs: Sequence[Run]) -> str:
    names = [f"`{run.key.name}`" for run in runs[:3]]
    return ", ".join(names) + (", …" if len(runs) > 3 else "")


def _what_was_run(analysis: Analysis, facts: Mapping[str, Any]) -> list[Block]:
    lines = []
    if facts.get("recipe"):
        lines.append(f"Recipe: {facts_line(facts['recipe'])}.")
    for label, model in (facts.get("models") or {}).items():
        schedule = model.get("schedule") or {}
        known = {k: schedule[k] for k in ("shape", "grouping", "aggregate", "mean_rate", "digest") if k in schedule}
        lines.append(f"Model {label}{f': schedule {facts_line(known)}' if known else ': no schedule'}.")
    for task in analysis.tasks:
        sizes = []
        for fraction in analysis.fractions:
            result = next((a.runs[0] for (_, t, f), cell in analysis.cells.items() if (t, f) == (task, fraction)
                           for a in cell.arms.values() if a.runs), None)  # fmt: skip
            if result is not None:
                sizes.append((f"{result.recipe.get('n_train', 0):,}", result))
        if sizes:
            r = sizes[0][1]
            lines.append(
                f"Task {task}: metric {r.metric}; {' / '.join(n for n, _ in sizes)} training examples "
                f"({r.recipe.get('train_data')}), {r.recipe.get('n_eval', 0):,} to evaluate on "
                f"({r.recipe.get('eval_data')})."
            )
    rows = []
    for arm in analysis.arms:
        rates = {round(a.mean_rate, 4) for cell in analysis.cells.values() for n, a in cell.arms.items()
                 if n == arm and a.mean_rate is not None}  # fmt: skip
        seconds = sorted(r.result.times["total"] for r in analysis.runs if r.key.arm == arm and r.result)
        shown = f"{min(rates):.4f}" + (f" to {max(rates):.4f}" if len(rates) > 1 else "") if rates else NOTHING
        rows.append([arm, meaning(arm), shown, f"{seconds[len(seconds) // 2]:.0f} s" if seconds else NOTHING])
    return [
        Heading("What was run"),
        Paragraph(
            "Runs of the same seed start from the same weights and see the same batches, whatever their arm. The metric is "
            "that on the evaluation data after the last epoch; more is better."
        ),
        Bullets(lines),
        Table(["arm", "what it is", "mean rate", "median time of a run"], rows, text_columns=(0, 1)),
    ]


def _again(analysis: Analysis, experiment: Experiment) -> list[Block]:
    results = [run.result for run in analysis.runs if run.result is not None]
    margin = f" --margin {analysis.margin:g}" if analysis.margin is not None else ""
    return [
        Heading("How to make it again"),
        Code(f"guided-dropout bench report {experiment.path}{margin}"),
        Bullets(
            [
                *origins([r.provenance for r in results]),
                "What all runs share is in `experiment.json`, what was asked for in `grid.json`, each run with its seeds, "
                "recipe, rates and history in `runs/`; `guided-dropout bench run` with the same options makes what is "
                "missing.",
                "Beside this report: `runs.csv`, `arms.csv`, `comparisons.csv`, `tables.tex`.",
            ]
        ),
    ]


def _limits(analysis: Analysis) -> list[Block]:
    limits = [
        "The intervals are about repeated fine-tuning (seeds) with these training and evaluation data; they say nothing of "
        "other data, other tasks or other models.",
        "Holm's correction is over the tasks of one pair of arms, model and fraction. Fractions, controls and models are "
        "not corrected for each other.",
    ]
    if controls.NONE in {c.role for c in analysis.comparisons} or controls.STANDARD in {
        c.role for c in analysis.comparisons
    }:
        limits.append(
            "Standard dropout and no dropout differ from a guided schedule in their mean rate as well, so they cannot tell "
            "guidance from less or more dropout. Only the controls at the same mean rate can."
        )
    if any(c.role == controls.OTHER for c in analysis.comparisons):
        limits.append(
            "Other regularizers were run at the strengths that their labels give, or at their defaults; a strength chosen "
            "with care may do better."
        )
    if analysis.margin is None:
        limits.append("Undecided is not the same as no difference: for that, a margin must be given (`--margin`).")
    return [Heading("What this does not show"), Bullets(limits)]
