"""The report of one schedule on one task: what was done, what came out, and what that does and does not show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from guided_dropout.bench.arms import ArmComparison, ArmResult, compare_arms, group_by_arm
from guided_dropout.bench.document import Block, Bullets, Code, Heading, Paragraph, Picture, Table, write_document
from guided_dropout.bench.phrases import count, verdict_sentence
from guided_dropout.bench.sections import (
    Difference,
    arm_figures,
    difference_table,
    how_to_read,
    lost_notes,
    meaning,
    origins,
)
from guided_dropout.fisher.profile import FisherProfile
from guided_dropout.fisher.spectrum import spectrum
from guided_dropout.plots.figures import figure_of, figure_svg, plot_layers, plot_paired, plot_spectrum
from guided_dropout.results import RunResult

GUIDED = "guided"


def write_report(
    out: str | Path,
    *,
    title: str,
    results: Sequence[RunResult],
    profile: FisherProfile,
    table: Sequence[Mapping[str, Any]],
    introduction: Sequence[str] = (),
    notes: Sequence[str] = (),
    commands: Sequence[str] = (),
    margin: float | None = None,
    confidence: float = 0.95,
) -> tuple[Path, Path]:
    """Write ``report.html`` (one file, refers to nothing outside), ``report.md`` and its ``figures/*.svg``.

    Args:
        out: the folder.
        title: of the report.
        results: the runs; they may differ in arm and seeds only. The arm ``"guided"`` is compared with each other arm.
        profile: where the schedule came from.
        table: rows of `regularizers.dropout_table` with scores and scheduled rates.
        introduction: paragraphs that stand first.
        notes: what a reader should keep in mind, one paragraph each.
        commands: how to make it again.
        margin: largest difference that does not matter, in the metric's unit; see `stats.verdict`.
        confidence: of the intervals.

    Returns:
        Paths of ``report.html`` and ``report.md``.

    Raises:
        DataError: the runs do not belong together.
        ArtefactError: `out` cannot be written.
    """
    arms = group_by_arm(results, confidence=confidence)
    comparisons = _comparisons(arms, confidence)
    blocks: list[Block] = [
        Heading(title, 1),
        *(Paragraph(text) for text in introduction),
        *(Paragraph(verdict_sentence(c, margin=margin), strong=True) for c in comparisons),
        *_what_was_done(results[0], arms, profile),
        *_arms(arms, confidence),
        *_differences(comparisons, results, margin, confidence),
        *_fisher(profile),
        *_sites(table),
        *_limits(comparisons, notes),
        *_again(results[0], commands),
    ]
    return write_document(out, title, blocks)


def _comparisons(arms: Sequence[ArmResult], confidence: float) -> list[ArmComparison]:
    guided = next((arm for arm in arms if arm.name == GUIDED), None)
    if guided is None:
        return []
    return [compare_arms(guided, arm, confidence=confidence) for arm in arms if arm is not guided]


def _what_was_done(run: RunResult, arms: Sequence[ArmResult], profile: FisherProfile) -> list[Block]:
    r, model = run.recipe, profile.model
    seeds = len({result.seeds for arm in arms for result in arm.runs})
    return [
        Heading("What was asked and done"),
        Paragraph(
            "Layers whose weights carry much Fisher information for the pretraining objective may suffer from dropout "
            "while they are fine-tuned. Guided dropout gives them a lower rate. Does that help, and is it the guidance "
            "that helps or merely less dropout?"
        ),
        Bullets(
            [
                f"Fisher information of `{model.get('architecture')}` ({model.get('num_parameters', 0):,} parameters) "
                f"measured on {profile.num_samples:,} samples of text, objective {profile.objective}.",
                f"Fine-tuned on the task {run.task}: {r['n_train']:,} training and {r['n_eval']:,} validation "
                f"examples, {r['epochs']} epochs, batches of {r['batch_size']}, learning rate {r['learning_rate']:g}.",
                f"{count(len(arms), 'arm')}, {count(seeds, 'seed')} each. Runs of the same seed start from the same "
                "weights and see the same batches; only the dropout rates differ.",
                f"The metric is {run.metric} on the validation split after the last epoch; more is better.",
            ]
        ),
    ]


def _arms(arms: Sequence[ArmResult], confidence: float) -> list[Block]:
    header = ["arm", "what it is", "mean rate", "runs", "mean", f"{confidence:.0%} interval", "median", "quartiles"]
    rows = [
        [a.name, meaning(a.name), f"{a.mean_rate or 0.0:.4f}", str(a.made), *arm_figures(a)]
        for a in arms
    ]  # fmt: skip
    table = Table(header, rows, text_columns=(0, 1))
    return [Heading("The arms"), table, *(note for arm in arms for note in lost_notes(arm))]


def _differences(
    comparisons: Sequence[ArmComparison], results: Sequence[RunResult], margin: float | None, confidence: float
) -> list[Block]:
    blocks: list[Block] = [Heading("Seed by seed")]
    compared = [c for c in comparisons if c.statistics]
    if compared:
        rows = [Difference([f"{c.a} − {c.b}"], c, c.verdict(margin)) for c in compared]
        blocks += [difference_table(["difference"], rows, confidence), how_to_read()]
    for c in comparisons:
        if c.left_out:
            seeds = count(c.left_out, "seed")
            verb = "is" if c.left_out == 1 else "are"
            blocks.append(Paragraph(f"{c.a} − {c.b}: {seeds} {verb} left out, for want of a metric in both."))
    notes = dict.fromkeys(note for c in compared if c.statistics for note in c.statistics.notes)
    blocks += [Paragraph(note) for note in notes]
    blocks.append(
        Picture(
            "paired",
            figure_svg(figure_of(plot_paired(results))),
            "The metric of each run by arm, with lines that join the runs of a seed",
            "Each thin line is one seed; its runs differ in dropout only. Thick bars are means.",
        )
    )
    return blocks


def _fisher(profile: FisherProfile) -> list[Block]:
    share = spectrum(profile).top_share(0.01)
    return [
        Heading("Where the Fisher information is"),
        Picture(
            "spectrum",
            figure_svg(figure_of(plot_spectrum(profile))),
            "Fisher values of all parameters, sorted, on logarithmic axes",
            f"The top 1 % of the parameters holds {100 * share:.0f} % of the Fisher information.",
        ),
    ]


def _sites(table: Sequence[Mapping[str, Any]]) -> list[Block]:
    def rate(row: Mapping[str, Any]) -> str:
        return f"{row['rate']:g} (as it was)" if row["scheduled_rate"] is None else f"{row['scheduled_rate']:.4f}"

    def score(row: Mapping[str, Any]) -> str:
        return "–" if row["score"] is None else f"{row['score']:.3e}"

    rows = [[f"`{r['path']}`", r["kind"], str(len(r["parameters"])), score(r), rate(r)] for r in table]
    return [
        Heading("Dropout sites"),
        Picture(
            "layers",
            figure_svg(figure_of(plot_layers(table))),
            "Fisher score and scheduled rate of each dropout site, in the order of the forward pass",
            "The site with the highest score gets the lowest rate. A head's own dropout is left as it was in all arms.",
        ),
        Table(["site", "kind", "tensors", "Fisher score", "guided rate"], rows, text_columns=(0, 1)),
    ]


def _limits(comparisons: Sequence[ArmComparison], notes: Sequence[str]) -> list[Block]:
    limits = [
        "The intervals are about repeated fine-tuning (seeds) on this one training and validation split; they say "
        "nothing of other data or other models.",
    ]
    if any(c.b == "dropout" for c in comparisons):
        limits.append(
            "The guided schedule's mean rate is lower than the standard one, so guided − dropout alone cannot tell "
            "guidance from less dropout; guided − uniform, at the same mean rate, takes that difference away. It still "
            "does not tell whether the Fisher scores matter or any uneven rates would do: that needs reversed and "
            "shuffled schedules, which were not run."
        )
    if len(comparisons) > 1:
        limits.append(f"Each of the {len(comparisons)} intervals stands alone; they are not adjusted for each other.")
    return [Heading("What this does not show"), Bullets([*limits, *notes])]


def _again(run: RunResult, commands: Sequence[str]) -> list[Block]:
    blocks: list[Block] = [Heading("How to make it again")]
    if commands:
        blocks.append(Code("\n".join(commands)))
    facts = [
        *origins([run.provenance]),
        f"Training data: {run.recipe.get('train_data')}. Validation data: {run.recipe.get('eval_data')}.",
        "Each run's seeds, recipe, rates and history are in its `result.json`.",
    ]
    return [*blocks, Bullets(facts)]
