"""The report of an experiment: what was done, what came out, and what that does and does not show.

Every claim is written by rule from an interval (`stats.verdict`); none is written by hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from guided_dropout.artefacts import write_text
from guided_dropout.bench.arms import ArmComparison, ArmResult, compare_arms, group_by_arm
from guided_dropout.bench.document import (
    Block,
    Bullets,
    Code,
    Heading,
    Paragraph,
    Picture,
    Table,
    to_html,
    to_markdown,
)
from guided_dropout.bench.stats import Interval, PairedComparison, verdict
from guided_dropout.fisher.profile import FisherProfile
from guided_dropout.fisher.spectrum import spectrum
from guided_dropout.plots import figure_of, figure_svg, plot_layers, plot_paired, plot_spectrum
from guided_dropout.results import RunResult

GUIDED = "guided"
ARM_MEANINGS = {
    "guided": "rates fall with the Fisher score of each site",
    "dropout": "one rate everywhere: the standard baseline",
    "uniform": "the guided schedule's mean rate everywhere: the control for just less dropout",
    "none": "no dropout",
}


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
    out = Path(out)
    arms = group_by_arm(results, confidence=confidence)
    comparisons = _comparisons(arms, confidence)
    blocks: list[Block] = [
        Heading(title, 1),
        *(Paragraph(text) for text in introduction),
        *(Paragraph(verdict_sentence(c, margin=margin), strong=True) for c in comparisons),
        *_what_was_done(results[0], arms, profile),
        *_arms(arms, confidence),
        *_differences(comparisons, results, margin),
        *_fisher(profile),
        *_sites(table),
        *_limits(comparisons, notes),
        *_again(results[0], commands),
    ]
    html, markdown = out / "report.html", out / "report.md"
    for picture in (b for b in blocks if isinstance(b, Picture)):
        write_text(out / "figures" / f"{picture.name}.svg", picture.svg)
    write_text(html, to_html(title, blocks))
    write_text(markdown, to_markdown(blocks))
    return html, markdown


def verdict_sentence(comparison: ArmComparison, *, margin: float | None = None) -> str:
    """What a comparison shows, in one or two sentences that claim no more than its interval does."""
    a, b, s = comparison.a, comparison.b, comparison.statistics
    if s is None:
        return f"{a} against {b}: no seed has a result in both, so nothing can be said."
    ruling = verdict(s, margin=margin)
    mean = f"{a} − {b} = {s.mean:+.4f} on average over {s.n} seed{'s'[: s.n > 1]}"
    if s.t_interval is None:
        return f"{mean}: {ruling}. {s.notes[0]}"
    interval = f"{s.confidence:.0%} interval {_interval(s.t_interval, '+.4f')}"
    if ruling == "helps":
        return f"{mean}, {interval}: {a} is better than {b} here. The interval excludes zero."
    if ruling == "hurts":
        return f"{mean}, {interval}: {a} is worse than {b} here. The interval excludes zero."
    shown = f"these {s.n} seeds do not show that {a} is better or worse than {b}"
    return f"{mean}, {interval}: {ruling}. The interval includes zero: {shown}."


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
                f"{len(arms)} arms, {seeds} seeds each. Runs of the same seed start from the same weights and see the "
                "same batches; only the dropout rates differ.",
                f"The metric is {run.metric} on the validation split after the last epoch; more is better.",
            ]
        ),
    ]


def _arms(arms: Sequence[ArmResult], confidence: float) -> list[Block]:
    header = ["arm", "what it is", "mean rate", "runs", "mean", f"{confidence:.0%} interval", "median", "quartiles"]
    rows = [[*_arm_facts(arm), *_arm_figures(arm)] for arm in arms]
    blocks: list[Block] = [Heading("The arms"), Table(header, rows, text_columns=(0, 1))]
    for arm in arms:
        if arm.diverged:
            blocks.append(Paragraph(f"{arm.diverged} of {len(arm.runs)} {arm.name} runs diverged and have no metric."))
        if arm.collapsed:
            blocks.append(Paragraph(f"{arm.collapsed} of {len(arm.runs)} {arm.name} runs predict a single class."))
    return blocks


def _arm_facts(arm: ArmResult) -> list[str]:
    rate = arm.runs[0].rates["mean"]
    return [arm.name, ARM_MEANINGS.get(arm.name, ""), f"{rate:.4f}", str(len(arm.runs))]


def _arm_figures(arm: ArmResult) -> list[str]:
    s = arm.summary
    if s is None:
        return ["–"] * 4
    return [f"{s.mean:.4f}", _interval(s.interval, ".4f"), f"{s.median:.4f}", _interval(s.quartiles, ".4f")]


def _differences(
    comparisons: Sequence[ArmComparison], results: Sequence[RunResult], margin: float | None
) -> list[Block]:
    blocks: list[Block] = [Heading("Seed by seed")]
    compared = [(c, c.statistics) for c in comparisons if c.statistics]
    if compared:
        header = [
            "difference", "verdict", "pairs", "mean", f"{compared[0][1].confidence:.0%} interval (t)",
            "bootstrap (BCa)", "better in", "signed-rank p", "detectable",
        ]  # fmt: skip
        rows = [[f"{c.a} − {c.b}", verdict(s, margin=margin), *_difference_figures(s)] for c, s in compared]
        blocks.append(Table(header, rows, text_columns=(0, 1)))
        blocks.append(
            Paragraph(
                "The verdict follows the t interval; the bootstrap's is too narrow with so few seeds and is given for "
                "comparison. Detectable is the true mean difference that this many seeds, with this spread, would find "
                "in 80 % of experiments."
            )
        )
    for c in comparisons:
        if c.left_out:
            blocks.append(Paragraph(f"{c.a} − {c.b}: {c.left_out} seeds are left out, for want of a metric in both."))
    blocks += [Paragraph(note) for note in dict.fromkeys(note for _, s in compared for note in s.notes)]
    blocks.append(
        Picture(
            "paired",
            figure_svg(figure_of(plot_paired(results))),
            "The metric of each run by arm, with lines that join the runs of a seed",
            "Each thin line is one seed; its runs differ in dropout only. Thick bars are means.",
        )
    )
    return blocks


def _difference_figures(s: PairedComparison) -> list[str]:
    return [
        str(s.n),
        f"{s.mean:+.4f}",
        _interval(s.t_interval, "+.4f"),
        _interval(s.bca_interval, "+.4f"),
        f"{s.improved:.0%}",
        "–" if s.wilcoxon_p is None else f"{s.wilcoxon_p:.3f}",
        "–" if s.detectable is None else f"{s.detectable:.4f}",
    ]


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
    p = run.provenance
    versions = ", ".join(f"{name} {version}" for name, version in p.get("versions", {}).items())
    machine = [str(p[key]) for key in ("platform", "device") if p.get(key)]
    blocks: list[Block] = [Heading("How to make it again")]
    if commands:
        blocks.append(Code("\n".join(commands)))
    facts = [
        f"Made with {versions}; Python {p.get('python')}.",
        f"{', '.join(machine)}, {p.get('threads')} threads, {p.get('date')}.",
        f"Training data: {run.recipe.get('train_data')}. Validation data: {run.recipe.get('eval_data')}.",
        "Each run's seeds, recipe, rates and history are in its `result.json`.",
    ]
    return [*blocks, Bullets(facts)]


def _interval(interval: Interval | None, form: str) -> str:
    # Rounded first: a tiny negative bound would be printed as -0.0000.
    return "–" if interval is None else "[{}, {}]".format(*(f"{round(bound, 4) + 0.0:{form}}" for bound in interval))
