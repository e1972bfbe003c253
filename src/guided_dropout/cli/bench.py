"""The command line's `bench`: run an experiment, report on it, compare two of its arms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from guided_dropout.cli.console import console, duration, errors, progress_bar
from guided_dropout.cli.options import ColumnNames, EvalData, HubSplits, Metrics, ResidualSites
from guided_dropout.errors import GuidedDropoutError
from guided_dropout.recipe import Recipe

if TYPE_CHECKING:
    from guided_dropout.bench.cost import Clock
    from guided_dropout.bench.folder import Experiment
    from guided_dropout.bench.grid import RunKey
    from guided_dropout.bench.plan import Plan
    from guided_dropout.bench.recipes import NamedExperiment
    from guided_dropout.data.task_data import DataSource

bench_app = typer.Typer(
    help="Does guidance help, where, by how much, and how sure are we?",
    short_help="Run experiments over models, tasks, arms, fractions and seeds; report on them.",
    no_args_is_help=True,
)

_LIST = "Several: with commas between them, or the option several times."


@bench_app.command()
def run(
    models: Annotated[list[str], typer.Option(help=f"'demo', folders or hub names. {_LIST}")],
    out: Annotated[Path, typer.Option(help="Folder of the experiment; what is there already is not run again.")],
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli; or OWNER/NAME[:CONFIG], data sets of the hub; "
            "or, with --data FILE, one name for it. \\[default: the file's]"
        ),
    ] = None,
    arms: Annotated[
        list[str] | None, typer.Option(help="As in `finetune --arm`. \\[default: dropout, guided, uniform]")
    ] = None,
    fractions: Annotated[
        list[str] | None, typer.Option(help="Parts of the training data, such as 1.0,0.5,0.1. \\[default: 1.0]")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Paired seeds, from 0 on. \\[default: 5]")] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="A whole experiment: paper_table2, paper_figure4, paper_a5, lodha or controls. "
            "Options given beside it come before it."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="GLUE folder, or a data set like the hub's nyu-mll/glue; or a file of your own to train on: .csv, "
            ".tsv, .jsonl or .parquet, or a pattern such as 'part-*.csv'."
        ),
    ] = None,
    eval_data: EvalData = None,
    columns: ColumnNames = None,
    metrics: Metrics = "",
    hub_splits: HubSplits = "",
    split: Annotated[
        str | None,
        typer.Option(
            metavar="glue|paper|holdout:SHARE",
            help="glue: GLUE's own dev split. paper: that and the training data pooled and dealt anew. "
            "holdout:0.2: a part of the training data, to choose by. \\[default: glue]",
        ),
    ] = None,
    profile: Annotated[
        list[str] | None,
        typer.Option(help="Fisher profile of the model; for several models, the option once for each, in their order."),
    ] = None,
    schedule: Annotated[
        list[Path] | None,
        typer.Option(
            help="Its schedule, likewise. \\[default: the paper's linear one from 0.1 to 0, made from the profile]"
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Runs side by side, each in a process with a model of its own.")] = 1,
    epochs: Annotated[
        int | None, typer.Option(help=f"Passes over the training data. \\[default: {Recipe.epochs}]")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help=f"Examples per step. \\[default: {Recipe.batch_size}]")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help=f"Peak learning rate. \\[default: {Recipe.learning_rate:g}]")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help=f"Tokens at which an example is cut. \\[default: {Recipe.max_length}]")
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(help=f"Rate of plain dropout (guided rates: --schedule). \\[default: {Recipe.rate:g}]"),
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(help=f"AdamW's weight decay. \\[default: {Recipe.weight_decay:g}]")
    ] = None,
    warmup_ratio: Annotated[
        float | None,
        typer.Option(help=f"Share of the steps until the peak. \\[default: {Recipe.warmup_ratio:g}]"),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16, or auto: bfloat16 on a GPU that has it. \\[default: auto]"),
    ] = None,
    device: Annotated[str, typer.Option(help="auto or cpu.")] = Recipe.device,
    residual_sites: ResidualSites = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would cost, and run nothing.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Make runs that failed once more.")] = False,
) -> None:
    """Fine-tune every combination, as far as it is not there yet; kill it and start it again as you like."""
    from guided_dropout.bench.folder import EXPERIMENT, Experiment, check_folder
    from guided_dropout.bench.run import check_joining, run_experiment
    from guided_dropout.data.task_data import DataSource

    if jobs < 1:
        raise GuidedDropoutError(f"found --jobs {jobs}; expected at least 1")
    given = {
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "max_length": max_length,
        "rate": rate,
        "weight_decay": weight_decay,
        "warmup_ratio": warmup_ratio,
        "precision": precision,
    }
    source = DataSource(data, eval_data, columns, metrics, hub_splits)
    names = _parts(tasks) or ([Path(data).name] if data and source.is_one_task else [])
    chosen = _recipe(recipe, names, _arms(arms), _numbers("fractions", fractions), seeds, split, given)
    source = replace(source, split=chosen.split)
    plan = _plan(chosen, _parts(models), profile or [], schedule or [], source, device, residual_sites)
    facts = plan.check()
    keys = list(plan.grid)
    if not dry_run:
        check_folder(out)
    if not (out / EXPERIMENT).exists():
        experiment, missing = None, keys
    else:
        experiment = Experiment(out)
        experiment.check(facts)
        failed = experiment.failed() if retry else ()
        missing = [k for k in keys if k in failed or not experiment.is_done(k)]
        if damaged := experiment.damaged(missing):
            console.print(f"{len(damaged):,} run files cannot be read and are made again, the first {damaged[0]}")
    console.print(f"{len(keys):,} runs, {len(keys) - len(missing):,} of them there, {len(missing):,} to make")
    if not missing:
        if experiment is not None and not dry_run:
            experiment.note_grid(plan.grid)  # runs that were there before anyone asked for them
        console.print(out)
        return
    jobs = min(jobs, len(missing))
    # A mistake that each run would make is found here, before anything is written.
    plan.rehearse(_told)
    if experiment is not None:
        check_joining(plan, experiment, missing)
    clock = _clock(plan, experiment)
    if dry_run or recipe:
        _tell_cost(plan, clock, missing, jobs)
    if dry_run:
        return
    experiment = Experiment.start(out, facts)
    experiment.note_grid(plan.grid)
    if retry:
        experiment.forget_failures(missing)
    counts: dict[str, int] = {}
    left = {k: clock.units(k) for k in missing}
    whole = sum(left.values())
    with progress_bar("runs", None) as update:

        def told(done: Any) -> None:
            counts[done.status] = counts.get(done.status, 0) + 1
            left.pop(done.key)
            if done.status not in ("elsewhere", "failed"):
                clock.saw(done.key, done.seconds)
            update(len(missing) - len(left), len(missing), left=_left(clock, list(left), jobs))
            k = done.key
            value = "" if done.value is None else f" {done.value:.4f}"
            name = f"{k.model} {k.task} {k.fraction:g} {k.arm} seed {k.seed}"
            share = 1 - sum(left.values()) / whole
            console.print(f"{share:4.0%} {name}: {done.status}{value} ({done.seconds:.0f} s)", highlight=False)

        run_experiment(plan, experiment, missing, jobs=jobs, told=told)
    console.print(", ".join(f"{n:,} {status}" for status, n in sorted(counts.items())))
    console.print(out)
    if lost := counts.get("failed"):
        errors.print(f"error: {_what_failed(experiment, missing, lost)}", highlight=False)
        raise typer.Exit(1)


@bench_app.command()
def report(
    experiment: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that `bench run` wrote, finished or not.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the report; by default DIR/report.")] = None,
    margin: Annotated[
        float | None,
        typer.Option(
            help="Largest difference that does not matter, in the metric's unit, such as 0.01; without it, `no "
            "difference` is never claimed."
        ),
    ] = None,
    confidence: Annotated[float, typer.Option(help="Of the intervals, and so of the verdicts.")] = 0.95,
) -> None:
    """Say what an experiment shows: verdicts, tables, figures; as HTML, Markdown, CSV and LaTeX."""
    from guided_dropout.bench.experiment_report import report_experiment
    from guided_dropout.bench.experiment_verdicts import claims

    analysis, files = report_experiment(experiment, out, margin=margin, confidence=confidence)
    of = "" if analysis.wanted is None else f" of {analysis.wanted:,}"
    console.print(f"{len(analysis.runs):,}{of} runs", highlight=False)
    for claim in claims(analysis):
        console.print(claim, highlight=False)
    for file in files:
        console.print(file)


@bench_app.command()
def compare(
    experiment: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that `bench run` wrote, finished or not.")],
    arm: Annotated[str, typer.Argument(metavar="ARM", help="Any arm of it, as in `bench run --arms`.")],
    other: Annotated[str, typer.Argument(metavar="OTHER", help="The arm that is subtracted.")],
    margin: Annotated[float | None, typer.Option(help="As in `bench report`.")] = None,
    confidence: Annotated[float, typer.Option(help="Likewise.")] = 0.95,
    csv: Annotated[Path | None, typer.Option("--csv", help="Write all numbers to this file.")] = None,
) -> None:
    """Compare any two arms, seed by seed; `bench report` has the comparisons that guidance is judged by.

    What nobody asked before the runs were made is a hint, not a test: an experiment has many pairs.
    """
    from guided_dropout.arms import choose_arm
    from guided_dropout.bench.analysis import analyse, compare_two
    from guided_dropout.bench.csv_files import OVERALL, write_comparisons
    from guided_dropout.bench.folder import Experiment
    from guided_dropout.bench.phrases import of_the_data, verdict_sentence

    there = Experiment(experiment)
    analysis = analyse(there.runs(), there.grids, margin=margin, confidence=confidence)
    arm, other = (name if name in analysis.arms else choose_arm(name).label for name in (arm, other))
    found = compare_two(analysis, arm, other)
    for c in found:
        place = f"{c.model}, {of_the_data(c.fraction)}, {c.task or OVERALL}"
        console.print(f"{place}: {verdict_sentence(c.pair, margin=margin)}", highlight=False)
    if csv is not None:
        console.print(write_comparisons(csv, found, analysis))


def _what_failed(experiment: Experiment, made: Sequence[RunKey], lost: int) -> str:
    """How many runs, why the first of them, and where that stands."""
    told = [
        f"the first with {' '.join(f'{r.failure.error}: {r.failure.message}'.split())} ({experiment.file(r.key)}"
        f"{' has the traceback' if r.failure.traceback else ''})"
        for r in experiment.whole_runs()
        if r.failure and r.key in made
    ]
    return "; ".join([f"{lost:,} of {len(made):,} runs failed", *told[:1], "expected none: mend it and add --retry"])


def _recipe(
    name: str | None,
    tasks: Sequence[str],
    arms: Sequence[str],
    fractions: Sequence[float],
    seeds: int | None,
    split: str | None,
    training: dict[str, Any],
) -> NamedExperiment:
    from guided_dropout.bench.recipes import NamedExperiment, get_recipe

    own = NamedExperiment("", tasks, arms or ("dropout", "guided", "uniform"), fractions or (1.0,), 5)
    base = get_recipe(name) if name else own
    if not tasks and not name:
        raise GuidedDropoutError(
            "found no --tasks, no --recipe and no --data FILE; expected one of them: name a task, or a file of your own"
        )
    given = {k: v for k, v in training.items() if v is not None}
    changes: dict[str, Any] = {"tasks": tasks, "arms": arms, "fractions": fractions, "seeds": seeds, "split": split}
    changes = {k: v for k, v in changes.items() if v or v == 0}
    return replace(base, **changes, recipe={**base.recipe, **given})


def _plan(
    chosen: NamedExperiment,
    models: Sequence[str],
    profiles: Sequence[str],
    schedules: Sequence[Path],
    source: DataSource,
    device: str,
    residual_sites: bool,
) -> Plan:
    from guided_dropout.bench.plan import BenchModel, Plan

    for option, values in (("profile", profiles), ("schedule", schedules)):
        if values and len(values) != len(models):
            raise GuidedDropoutError(
                f"found {len(values)} --{option} for {len(models)} models; expected the option once for each model, in "
                f"their order: {' '.join(f'--{option} …' for _ in models)}"
            )
    known = [
        BenchModel(m, profiles[i] if profiles else None, str(schedules[i]) if schedules else None, residual_sites)
        for i, m in enumerate(models)
    ]
    recipe = Recipe(device=device, evaluate="end", **chosen.recipe)
    return Plan.of(
        known, chosen.tasks, chosen.arms, chosen.fractions, range(chosen.seeds), source, recipe=recipe,
    )  # fmt: skip


def _clock(plan: Plan, experiment: Experiment | None) -> Clock:
    from guided_dropout.bench.cost import Clock, work_of_tasks
    from guided_dropout.models import load_classifier

    sizes = {
        label: sum(p.numel() for p in load_classifier(m.source, 2, head_seed=0).parameters())
        for label, m in plan.models.items()
    }
    clock = Clock(work_of_tasks(plan, _told), sizes)
    if experiment is not None:
        clock.saw_runs(experiment.whole_runs())
    return clock


def _tell_cost(plan: Plan, clock: Clock, missing: Sequence[RunKey], jobs: int) -> None:
    from guided_dropout.bench.cost import trial

    seconds, how = clock.seconds(missing), "as fast as the runs that are there"
    if seconds is None:
        model = missing[0].model
        for task in dict.fromkeys(key.task for key in missing):
            clock.saw_trial(model, task, *trial(plan, model, task))
        seconds, how = clock.seconds(missing) or 0.0, "by a few steps of training here"
    shared = f", {duration(seconds / jobs)} if {jobs} side by side do not slow one another" if jobs > 1 else ""
    console.print(f"about {duration(seconds)} one after the other{shared} ({how})")


def _left(clock: Clock, keys: Sequence[RunKey], jobs: int) -> float | None:
    seconds = clock.seconds(keys)
    return None if seconds is None else seconds / max(1, min(jobs, len(keys)))


def _told(note: str) -> None:
    console.print(note, style="dim", highlight=False)


def _parts(values: Sequence[str] | None) -> list[str]:
    return [part.strip() for value in values or () for part in value.split(",") if part.strip()]


def _arms(values: Sequence[str] | None) -> list[str]:
    """Arms; a part such as ``k=2`` in ``mixout:p=0.9,k=2`` belongs to the one before."""
    arms: list[str] = []
    for part in _parts(values):
        if arms and "=" in part and ":" not in part:
            arms[-1] += f",{part}"
        else:
            arms.append(part)
    return arms


def _numbers(option: str, values: Sequence[str] | None) -> list[float]:
    try:
        return [float(part) for part in _parts(values)]
    except ValueError:
        found = ",".join(values or ())
        raise GuidedDropoutError(f"--{option} {found}; expected numbers, such as 1.0,0.5,0.1") from None
