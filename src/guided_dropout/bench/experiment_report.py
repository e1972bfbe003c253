"""The report of an experiment, finished or not: verdicts, tables, figures, what went wrong, what it does not show."""

from __future__ import annotations

import shlex
from collections import Counter, defaultdict
from pathlib import Path

from guided_dropout.artefacts import check_output_folder, staged_folder, write_text
from guided_dropout.bench import controls
from guided_dropout.bench.analysis import Analysis, analyse
from guided_dropout.bench.arms import STATUSES
from guided_dropout.bench.csv_files import write_csv
from guided_dropout.bench.document import (
    FIGURES_NAME,
    HTML_NAME,
    MARKDOWN_NAME,
    Block,
    Bullets,
    Code,
    Heading,
    Paragraph,
    write_document,
)
from guided_dropout.bench.experiment_figures import curves, forests, run_by_run
from guided_dropout.bench.experiment_runs import what_became, what_was_run
from guided_dropout.bench.experiment_verdicts import comparisons, place_name, verdicts
from guided_dropout.bench.folder import Experiment
from guided_dropout.bench.phrases import capital, count, listing
from guided_dropout.bench.restarts import restarts, to_latex
from guided_dropout.bench.sections import origins

LATEX_NAME = "tables.tex"
CONFIDENCE = 0.95


def report_experiment(
    path: str | Path, out: str | Path | None = None, *, margin: float | None = None, confidence: float = CONFIDENCE
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
    elsewhere = "" if out is None else f" --out {shlex.quote(str(out))}"
    out = Path(path) / "report" if out is None else Path(out)
    check_output_folder(out, marker=HTML_NAME)
    analysis = analyse(experiment.runs(), experiment.grids, margin=margin, confidence=confidence)
    name = experiment.path.resolve().name
    tables = restarts(analysis)
    blocks: list[Block] = [
        Heading(f"Experiment {name}", 1),
        *_progress(analysis),
        *verdicts(analysis),
        Heading("Maximum and mean over the restarts"),
        Paragraph("Each cell: maximum / mean over an arm's runs, as in Table 2 of the paper."),
        *(block for t in tables for block in (Heading(place_name(analysis, t.model, t.fraction), 3), t.table(),
                                             *map(Paragraph, t.notes))),
        *curves(analysis),
        *forests(analysis),
        *comparisons(analysis),
        *run_by_run(analysis),
        *what_became(analysis),
        *what_was_run(analysis, experiment.facts),
        *_again(analysis, experiment, elsewhere),
        *_limits(analysis),
    ]  # fmt: skip
    with staged_folder(out, own=(HTML_NAME, MARKDOWN_NAME, FIGURES_NAME, LATEX_NAME)) as folder:
        written = [*write_document(folder, f"Experiment {name}", blocks), *write_csv(folder, analysis)]
        write_text(folder / LATEX_NAME, to_latex(tables, name))
        written.append(folder / LATEX_NAME)
    return analysis, [out / file.name for file in written]


def _progress(analysis: Analysis) -> list[Block]:
    made, wanted = len(analysis.runs), analysis.wanted
    cells: dict[tuple[str, str, float], set[int]] = defaultdict(set)
    for run in analysis.runs:
        cells[run.key.model, run.key.task, run.key.fraction].add(run.key.seed)
    fewest, most = min(map(len, cells.values())), max(map(len, cells.values()))
    seeds = f"{fewest} to {count(most, 'seed')}" if fewest < most else count(most, "seed")
    lost = Counter(run.status for run in analysis.runs)
    wrong = listing([f"{lost[s]:,} {s}" for s in STATUSES[1:] if lost[s]])
    blocks: list[Block] = []
    if wanted is not None and made < wanted:
        blocks.append(
            Paragraph(
                f"Not finished: {made:,} of {wanted:,} runs are there. What follows is of those alone and may change.",
                strong=True,
            )
        )
    blocks.append(
        Paragraph(
            f"{count(made, 'run')}{f' of {wanted:,}' if wanted is not None else ''}: "
            f"{count(len(analysis.models), 'model')} ({', '.join(analysis.models)}), "
            f"{count(len(analysis.tasks), 'task')} ({', '.join(analysis.tasks)}), {count(len(analysis.arms), 'arm')}, "
            f"training on {listing([f'{100 * f:g} %' for f in analysis.fractions])} of the data, "
            f"{seeds}. {f'Of the runs, {wrong}.' if wrong else 'All of them ended well.'}"
        )
    )
    return blocks


def _again(analysis: Analysis, experiment: Experiment, elsewhere: str) -> list[Block]:
    results = [run.result for run in analysis.runs if run.result is not None]
    margin = f" --margin {analysis.margin:g}" if analysis.margin is not None else ""
    confidence = f" --confidence {analysis.confidence:g}" if analysis.confidence != CONFIDENCE else ""
    return [
        Heading("How to make it again"),
        Code(f"guided-dropout bench report {shlex.quote(str(experiment.path))}{margin}{confidence}{elsewhere}"),
        Bullets(
            [
                *origins([r.provenance for r in results]),
                "What all runs share is in `experiment.json`, what was asked for in `grid.json`, each run with its "
                "seeds, recipe, rates and history in `runs/`; `guided-dropout bench run` with the same options makes "
                "what is missing.",
                "Beside this report: `runs.csv`, `arms.csv`, `comparisons.csv`, `tables.tex`.",
            ]
        ),
    ]


def _of_another_mean(analysis: Analysis) -> list[str]:
    """Standard dropout and no dropout, where they were run at another mean rate than a guided arm."""
    unlike = {c.role for c in analysis.comparisons if not c.same_mean and c.pair.statistics is not None}
    return [role for role in (controls.STANDARD, controls.NONE) if role in unlike]


def _limits(analysis: Analysis) -> list[Block]:
    limits = [
        "The intervals are about repeated fine-tuning (seeds) with these training and evaluation data; they say "
        "nothing of other data, other tasks or other models.",
        "Holm's correction is over the tasks of one pair of arms, model and fraction. Fractions, controls and models "
        "are not corrected for each other.",
    ]
    if unlike := _of_another_mean(analysis):
        limits.append(
            f"{capital(listing(unlike))} {'differs' if len(unlike) == 1 else 'differ'} from a guided schedule in the "
            "mean rate as well, and so cannot tell guidance from less or more dropout. Only the controls at the same "
            "mean rate can."
        )
    if deals := sum(controls.name_of(arm) == "shuffled" for arm in analysis.arms):
        each = "`shuffled`" if deals == 1 else "Each `shuffled` arm"
        shown = "it shows is of that deal" if deals == 1 else f"they show is of these {deals} deals"
        limits.append(
            f"{each} deals the guided rates out once, in the same way in all runs: what {shown}; the intervals hold no "
            "other."
        )
    if any(c.role == controls.OTHER for c in analysis.comparisons):
        limits.append(
            "Other regularizers were run at the strengths that their labels give, or at their defaults; a strength "
            "chosen with care may do better."
        )
    if analysis.margin is None:
        limits.append("Undecided is not the same as no difference: for that, a margin must be given (`--margin`).")
    return [Heading("What this does not show"), Bullets(limits)]
