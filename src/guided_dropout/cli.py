"""The command line: arguments in, one call, paths out."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from guided_dropout.cli_schedule import schedule_app
from guided_dropout.console import arms_help, console, errors, progress_bar, site_table
from guided_dropout.errors import DataError, GuidedDropoutError, unknown

if TYPE_CHECKING:
    from guided_dropout.texts import Text

if TYPE_CHECKING:
    from guided_dropout.fisher import FisherProfile

app = typer.Typer(
    name="guided-dropout",
    help="Dropout rates for fine-tuning language models, guided by the Fisher information of the pretrained weights.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(schedule_app, name="schedule")

PROFILE_HELP = "a folder that `fisher` wrote, or user/name on the hub"
MODEL_HELP = "a local folder, a name on the hub, or 'demo' (embedded)"
Model = Annotated[str, typer.Argument(metavar="MODEL", help=f"The model: {MODEL_HELP}.")]
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
Seed = Annotated[int, typer.Option(help="Random seed.")]


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for the report and everything it was made from.")],
    seeds: Annotated[int, typer.Option(help="Paired restarts of each arm.")] = 5,
) -> None:
    """Show the whole thing on an embedded model and text: Fisher, schedule, paired fine-tuning, report."""
    from guided_dropout.demo.quickstart import quickstart as run

    for path in run(out, seeds=seeds):
        console.print(path)


@app.command()
def fisher(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the profile.")],
    text: Annotated[
        str | None,
        typer.Option(
            help="Text to measure on: a UTF-8 file or folder (.txt, .jsonl, .gz, .xz), 'demo' (embedded), or "
            "hub:NAME[:CONFIG[:SPLIT[:COLUMN]]], a data set."
        ),
    ] = None,
    task: Annotated[str | None, typer.Option(help="Instead of a text: a task that MODEL was fine-tuned on.")] = None,
    data: Annotated[str | None, typer.Option(help="The task's data, as for finetune.")] = None,
    objective: Annotated[
        str, typer.Option(help="auto, mlm (masked LM), causal (next token) or seq2seq (span corruption).")
    ] = "auto",
    labels: Annotated[
        str,
        typer.Option("--fisher", help="empirical (the data's labels) or sampled (drawn from the model's prediction)."),
    ] = "empirical",
    samples: Annotated[str, typer.Option(help="How many samples to draw, or 'all', in their order.")] = "1000",
    max_characters: Annotated[
        int | None, typer.Option(help="Read no more of the text. Without it, 200 million to draw samples from.")
    ] = None,
    max_length: Annotated[int, typer.Option(help="Tokens per sample.")] = 128,
    batch_size: Annotated[int, typer.Option(help="Samples per forward pass; changes speed and memory only.")] = 8,
    tokens_per_batch: Annotated[
        int | None, typer.Option(help="Instead of --batch-size: tokens per forward pass at most, padding counted.")
    ] = None,
    reduction: Annotated[str, typer.Option(help="A sample's loss: mean or sum over its targets.")] = "mean",
    skip_nonfinite: Annotated[
        bool, typer.Option("--skip-nonfinite", help="Leave out and count samples whose loss is NaN or infinite.")
    ] = False,
    resume: Annotated[
        bool | None, typer.Option(help="Go on with an unfinished run from OUT.checkpoint, or start afresh.")
    ] = None,
    checkpoint_every: Annotated[float, typer.Option(help="Seconds between two writes of OUT.checkpoint.")] = 300.0,
    device: Annotated[str | None, typer.Option(help="For instance cpu or cuda:1; default: a GPU if any.")] = None,
    device_map: Annotated[
        str | None, typer.Option(help="Spread a model over several devices, for instance auto.")
    ] = None,
    parameters: Annotated[
        str, typer.Option(help="Which to measure: all, trainable, or base (none that an adapter has brought).")
    ] = "all",
    save_dtype: Annotated[str, typer.Option(help="Of the values on disk: float32, or bfloat16 for half.")] = "float32",
    scores_only: Annotated[
        bool, typer.Option("--scores-only", help="Keep each tensor's mean alone: all a schedule needs, flat in memory.")
    ] = False,
    until_ranked: Annotated[
        bool, typer.Option("--until-ranked", help="Stop as soon as the order of the sites is settled.")
    ] = False,
    rank_confidence: Annotated[float, typer.Option(help="Of --until-ranked.")] = 0.95,
    rank_tolerance: Annotated[
        float, typer.Option(help="Of --until-ranked: scores that differ by less may change places.")
    ] = 0.05,
    dtype: Annotated[str, typer.Option(help="Of the weights while measuring: float32, bfloat16, float16, float64.")] = (
        "float32"
    ),
    seed: Seed = 0,
) -> None:
    """Measure a model's diagonal Fisher information on a text; do it once per model."""
    from guided_dropout import inputs
    from guided_dropout.artefacts import check_output_folder
    from guided_dropout.devices import check_placement, to_device
    from guided_dropout.fisher import estimate_fisher, profile
    from guided_dropout.fisher.checkpoint import check_unused, holds_state, remove_checkpoint
    from guided_dropout.fisher.processes import current_processes, leave_processes
    from guided_dropout.fisher.ranking import RankingTest
    from guided_dropout.models import DTYPES, load_lm, load_model, load_tokenizer
    from guided_dropout.sites import find_sites

    state = out.with_name(f"{out.name}.checkpoint")
    world = current_processes()
    with world.together():
        check_placement(device, device_map, world.count)
        if world.is_main:
            check_output_folder(out, marker=profile.JSON_NAME)
        profile.check_dtype(save_dtype)
        if resume is None:
            check_unused(state)
        if (text is None) == (task is None) or (data is not None and task is None):
            raise DataError(f"--text {text}, --task {task}, --data {data}; expected --text, or --task with its --data")
        source_of_labels = _choose("--fisher", labels, {"empirical": "data", "sampled": "model"})
        precision = _choose("--dtype", dtype, DTYPES)
        number = inputs.number_of_samples(samples)
        if until_ranked and number is None:
            raise DataError("--until-ranked with --samples all; expected samples drawn at random: give their number")
        if text is not None:
            limit = inputs.MAX_CHARACTERS if max_characters is None and number else max_characters
            lines = _open_text(text, limit)
            loaded, tokenizer = load_lm(model, objective, precision, device_map), load_tokenizer(model)
            with progress_bar("blocks of text", None, shown=world.is_main) as update:
                given = inputs.text_inputs(
                    loaded, tokenizer, lines, num_samples=number, max_length=max_length, seed=seed, progress=update
                )  # fmt: skip
        else:
            loaded, tokenizer = load_model(model, precision, device_map), load_tokenizer(model)
            given = inputs.task_inputs(
                loaded, tokenizer, str(task), data, num_samples=number, max_length=max_length, seed=seed
            )  # fmt: skip
        ranking = None
        if until_ranked:
            sites = {s.path: s.parameters for s in find_sites(loaded) if not s.in_head}
            ranking = RankingTest(sites, alpha=1 - rank_confidence, tolerance=rank_tolerance)
        if device_map is None:
            loaded = to_device(loaded, device or world.device)
    if world.is_main:
        for note in given.notes:
            console.print(note)
    share = "samples" if world.count == 1 else f"samples of process 1 of {world.count}"
    counted = _Counted(given.samples)
    with (
        _interrupts_wait() as stop_if_asked,
        progress_bar(share, given.total and -(-given.total // world.count), shown=world.is_main) as update,
    ):

        def progress(done: int) -> None:
            update(done, tokens=counted.tokens_each)
            stop_if_asked()

        try:
            measured = estimate_fisher(
                loaded,
                counted,
                batch_size=batch_size,
                tokens_per_batch=tokens_per_batch,
                objective=objective,
                reduction=reduction,
                labels=source_of_labels,
                parameters=parameters,
                seed=seed,
                scores_only=scores_only,
                until_ranked=ranking,
                nonfinite="skip" if skip_nonfinite else "error",
                checkpoint=state,
                checkpoint_every=checkpoint_every,
                resume=resume,
                distributed=world.count > 1,
                progress=progress,
                facts={"source": model, "samples": samples, **given.facts},
            )
        except _Interrupted:
            if not world.is_main:
                sys.exit(2)
            if holds_state(state):
                raise _Interrupted(
                    f"the state is in {state}: run the same command with --resume to go on from there"
                ) from None
            raise
    with world.together():
        if world.is_main:
            folder = measured.save_pretrained(out, dtype=save_dtype)
            remove_checkpoint(state)
            _print_fisher(measured, folder)
    leave_processes()


def _print_fisher(measured: FisherProfile, folder: Path) -> None:
    coverage = measured.coverage
    left_out = coverage.get("nonfinite", [])
    some = ", ".join(map(str, left_out[:10])) + (", …" if len(left_out) > 10 else "")
    console.print(
        f"{measured.num_samples:,} samples ({measured.objective}), {measured.num_skipped} without a target skipped"
        + (f", {len(left_out)} not finite left out (number {some} of the stream, from 0)" if left_out else "")
        + f"; {coverage['parameters_by_rule']:.1%} of the parameters by rule"
        + (f", one sample at a time: {', '.join(coverage['fallback'])}" if coverage["fallback"] else "")
    )
    if ranking := measured.provenance.get("ranking"):
        doubtful = [" < ".join(pair) for pair in ranking["undecided"]]
        console.print(
            f"order of the sites {'settled' if ranking['settled'] else 'not settled'} after {ranking['samples']:,} "
            f"samples (confidence {ranking['confidence']:.0%}, tolerance {ranking['tolerance']:.0%})"
            + (f"; undecided: {', '.join(doubtful)}" if doubtful else "")
        )
    console.print(folder)


class _Counted:
    """Samples, counted with their tokens as they are read."""

    def __init__(self, samples: Iterable[Mapping[str, Any]]):
        self._samples, self._read, self._tokens = samples, 0, 0

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for sample in self._samples:
            self._read += 1
            self._tokens += len(sample["input_ids"])
            yield sample

    @property
    def tokens_each(self) -> float:
        return self._tokens / max(1, self._read)


@app.command()
def merge(
    profiles: Annotated[list[str], typer.Argument(metavar="PROFILE...", help=f"Two or more: {PROFILE_HELP}.")],
    out: Annotated[Path, typer.Option(help="Folder for the merged profile.")],
) -> None:
    """Make one profile of several that were measured on different samples, each weighted by how many it saw."""
    from guided_dropout.artefacts import check_output_folder
    from guided_dropout.fisher import FisherProfile, profile
    from guided_dropout.fisher import merge as run

    check_output_folder(out, marker=profile.JSON_NAME)
    merged = run(*map(FisherProfile.from_pretrained, profiles))
    folder = merged.save_pretrained(out)
    console.print(f"{merged.num_samples:,} samples" + ("" if merged.diagonal else ", tensor means only"))
    console.print(folder)


@app.command()
def inspect(
    model: Model,
    profile: Annotated[str | None, typer.Option(help=f"Adds each site's score: {PROFILE_HELP}.")] = None,
    schedule: Annotated[Path | None, typer.Option(help="Schedule file: adds each site's rate in it.")] = None,
    grouping: Annotated[str, typer.Option(help="Which parameters feed a site: owner or dataflow.")] = "owner",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with the parameters' names.")] = False,
) -> None:
    """List a model's dropout sites, found by running it: path, kind, the rate that arrives, what feeds it, score."""
    from guided_dropout.fisher import FisherProfile
    from guided_dropout.models import load_model
    from guided_dropout.regularizers import dropout_table
    from guided_dropout.schedule import DropoutSchedule
    from guided_dropout.sites import trace

    loaded = load_model(model)
    measured = FisherProfile.from_pretrained(profile) if profile else None
    planned = DropoutSchedule.load(schedule) if schedule else None
    rows = dropout_table(loaded, planned, measured, grouping)
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
        return
    console.print(site_table(rows))
    dead = trace(loaded).dead
    if dead:
        console.print(f"set but never used in training: {', '.join(dead)}", style="dim")
    if measured and measured.noise:
        console.print(f"rounding noise alone, left out of the scores: {', '.join(measured.noise)}", style="dim")


@app.command(epilog=arms_help())
def finetune(
    model: Model,
    task: Annotated[str, typer.Option(help="cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte or wnli.")],
    out: Annotated[Path, typer.Option(help="Folder for result.json.")],
    data: Annotated[str | None, typer.Option(help="GLUE folder, or a data set like the hub's nyu-mll/glue.")] = None,
    arm: Annotated[
        str, typer.Option(help="One of the arms below, with parameters if need be: mixout:p=0.9.")
    ] = "guided",
    arm_param: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A parameter of the arm; may be given several times.")
    ] = None,
    schedule: Annotated[Path | None, typer.Option(help="Schedule file, for guided arms and controls.")] = None,
    profile: Annotated[Path | None, typer.Option(help="Profile folder, for arms that go by Fisher.")] = None,
    seed: Seed = 0,
    train_fraction: Annotated[float, typer.Option(help="Share of the training data to use.")] = 1.0,
    epochs: Annotated[int, typer.Option(help="Passes over the training data.")] = 3,
    batch_size: Annotated[int, typer.Option(help="Examples per step.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-5,
    max_length: Annotated[int, typer.Option(help="Tokens at which an example is cut.")] = 128,
    rate: Annotated[float, typer.Option(help="Rate of plain dropout, in arms that do not set it themselves.")] = 0.1,
    weight_decay: Annotated[float, typer.Option(help="AdamW's weight decay.")] = 0.0,
) -> None:
    """Fine-tune on one task under one arm; runs with the same seed differ in the arm only."""
    from guided_dropout.finetune import finetune as run
    from guided_dropout.fisher import FisherProfile
    from guided_dropout.schedule import DropoutSchedule

    planned = DropoutSchedule.load(schedule) if schedule else None
    measured = FisherProfile.from_pretrained(profile) if profile else None
    with progress_bar(f"{task} {arm}", None) as update:
        result = run(
            model,
            task,
            data=data,
            arm=arm,
            arm_parameters=arm_param or (),
            schedule=planned,
            profile=measured,
            seed=seed,
            train_fraction=train_fraction,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            max_length=max_length,
            rate=rate,
            weight_decay=weight_decay,
            out=out,
            progress=update,
        )
    value = "diverged" if result.value is None else f"{result.value:.4f}"
    console.print(f"{result.task} {result.arm} seed {seed}: {result.metric} {value} ({result.times['total']:.0f} s)")
    console.print(out / "result.json")


def _open_text(text: str, max_characters: int | None) -> Text:
    from guided_dropout.texts import Text, stream_text

    if text != "demo":
        return stream_text(text, max_characters=max_characters)
    from guided_dropout.demo.text import demo_paragraphs

    return Text(text, lambda: iter(demo_paragraphs()), max_characters)


def _choose(option: str, given: str, meaning: Mapping[str, Any]) -> Any:
    if given not in meaning:
        raise DataError(unknown(option, given, meaning))
    return meaning[given]


def main() -> None:
    """Run the command line; a mistake of the user's is one line on stderr and exit code 2."""
    for number in _SIGNALS:
        signal.signal(number, _interrupt)
    try:
        app(standalone_mode=True)
    except GuidedDropoutError as e:
        if not e.told_elsewhere:
            errors.print(f"error: {' '.join(str(e).split())}", markup=False, highlight=False)
        sys.exit(2)
    except _Interrupted as e:
        what = str(e) or "nothing was written by the unfinished step: run the command again"
        errors.print(f"error: interrupted; {what}", markup=False, highlight=False)
        sys.exit(2)


class _Interrupted(BaseException):
    """Not a KeyboardInterrupt, of which Typer would make its own message and exit code."""


def _interrupt(*_: Any) -> None:
    raise _Interrupted


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[Callable[[], None]]:
    """Within, a signal waits for a call of what is yielded, which raises it; a second one does not wait."""
    asked = False

    def ask(*_: Any) -> None:
        nonlocal asked
        if asked:
            raise _Interrupted
        asked = True

    def stop_if_asked() -> None:
        if asked:
            raise _Interrupted

    before = {number: signal.signal(number, ask) for number in _SIGNALS}
    try:
        yield stop_if_asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
