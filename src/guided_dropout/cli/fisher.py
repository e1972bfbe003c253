"""The command line's `fisher` and `merge`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from guided_dropout.cli import options
from guided_dropout.cli.console import console, progress_bar
from guided_dropout.cli.inputs import Given
from guided_dropout.cli.interrupts import interrupts_wait, resumable
from guided_dropout.cli.shared import choose
from guided_dropout.errors import DataError

if TYPE_CHECKING:
    from guided_dropout.fisher import FisherProfile

# Of the rules to stop by
_TAU, _CONFIDENCE, _TOLERANCE = 0.95, 0.95, 0.05


def fisher(
    model: options.Model,
    out: Annotated[Path, typer.Option(help="Folder for the profile.")],
    text: options.TextOrTask = None,
    task: options.Task = None,
    data: options.TaskData = None,
    columns: options.ColumnNames = None,
    objective: options.Objective = "auto",
    labels: Annotated[
        str,
        typer.Option("--fisher", help="empirical (the data's labels) or sampled (drawn from the model's prediction)."),
    ] = "empirical",
    samples: Annotated[str, typer.Option(help="How many samples to draw, or 'all', in their order.")] = "1000",
    max_characters: options.MaxCharacters = None,
    max_length: options.MaxLength = 128,
    batch_size: options.BatchSize = 8,
    tokens_per_batch: options.TokensPerBatch = None,
    reduction: Annotated[str, typer.Option(help="A sample's loss: mean or sum over its targets.")] = "mean",
    skip_nonfinite: Annotated[
        bool, typer.Option("--skip-nonfinite", help="Leave out and count samples whose loss is NaN or infinite.")
    ] = False,
    resume: Annotated[
        bool | None,
        typer.Option(
            help="Go on with an unfinished run from OUT.checkpoint, or start afresh. Where OUT holds the profile of "
            "the same run already, --resume measures nothing; that of another is refused."
        ),
    ] = None,
    checkpoint_every: options.CheckpointEvery = 300.0,
    device: options.Device = None,
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
    until_stable: Annotated[
        bool,
        typer.Option(
            "--until-stable", help="Stop as soon as the order as a whole is settled; a few ties may stay open."
        ),
    ] = False,
    stable_tau: Annotated[
        float, typer.Option(help="Of --until-stable: Kendall's tau with the order that other samples would give.")
    ] = _TAU,
    rank_confidence: Annotated[float, typer.Option(help="Of --until-ranked and --until-stable.")] = _CONFIDENCE,
    rank_tolerance: Annotated[
        float, typer.Option(help="Of --until-ranked: scores that differ by less may change places.")
    ] = _TOLERANCE,
    dtype: options.Dtype = "float32",
    seed: options.Seed = 0,
) -> None:
    """Measure a model's diagonal Fisher information on a text; do it once per model."""
    from guided_dropout.artefacts import beside, check_output_folder
    from guided_dropout.devices import check_placement, to_device
    from guided_dropout.fisher import estimate_fisher, profile
    from guided_dropout.fisher.checkpoint import check_unused, holds_state, remove_checkpoint
    from guided_dropout.fisher.finished import finished_profile
    from guided_dropout.fisher.processes import current_processes, leave_processes
    from guided_dropout.fisher.ranking import RankingTest
    from guided_dropout.fisher.stability import StabilityTest
    from guided_dropout.sites import find_sites

    state = beside(out, ".checkpoint")
    world = current_processes()
    with world.together():
        check_placement(device, device_map, world.count)
        if world.is_main:
            check_output_folder(out, marker=profile.JSON_NAME)
        profile.check_dtype(save_dtype)
        if resume is None:
            check_unused(state)
        source_of_labels = choose("--fisher", labels, {"empirical": "data", "sampled": "model"})
        given = Given(
            model=model, text=text, task=task, data=data, columns=columns, samples=samples, objective=objective,
            max_characters=max_characters, max_length=max_length, dtype=dtype, device_map=device_map, seed=seed,
        )  # fmt: skip
        if until_ranked and until_stable:
            raise DataError("both --until-ranked and --until-stable; expected one rule to stop by: leave one out")
        unused = [
            (f"--stable-tau {stable_tau}", "--until-stable", stable_tau != _TAU and not until_stable),
            (f"--rank-tolerance {rank_tolerance}", "--until-ranked", rank_tolerance != _TOLERANCE and not until_ranked),
            (
                f"--rank-confidence {rank_confidence}",
                "--until-ranked or --until-stable",
                rank_confidence != _CONFIDENCE and not (until_ranked or until_stable),
            ),
        ]
        for option, rule, alone in unused:
            if alone:
                raise DataError(f"{option} without {rule}, whose option it is; expected both or neither")
        if not 0 < rank_confidence < 1:
            raise DataError(f"--rank-confidence {rank_confidence:g}; expected a number between 0 and 1, as 0.95")
        if scores_only and save_dtype != "float32":
            raise DataError(f"--save-dtype {save_dtype} with --scores-only, which keeps no values: leave one out")
        if (until_ranked or until_stable) and given.number is None:
            rule = "--until-ranked" if until_ranked else "--until-stable"
            raise DataError(f"{rule} with --samples all; expected samples drawn at random: give their number")
        loaded, inputs = given.load(shown=world.is_main)
        ranking = None
        if until_ranked or until_stable:
            sites = {s.path: s.parameters for s in find_sites(loaded) if not s.in_head}
            ranking = (
                RankingTest(sites, alpha=1 - rank_confidence, tolerance=rank_tolerance)
                if until_ranked
                else StabilityTest(sites, tau=stable_tau, confidence=rank_confidence, seed=seed)
            )
        if device_map is None:
            loaded = to_device(loaded, device or world.device)

    def is_finished() -> bool:
        if not world.is_main or holds_state(state) or not (out / profile.JSON_NAME).exists():
            return False
        found = finished_profile(
            out,
            loaded,
            parameters=parameters,
            objective=objective,
            scores_only=scores_only,
            save_dtype=save_dtype,
            until_ranked=ranking,
            method="batched",
            reduction=reduction,
            labels=source_of_labels,
            batch_size=batch_size if tokens_per_batch is None else None,
            tokens_per_batch=tokens_per_batch,
            processes=world.count,
            **inputs.facts,
        )
        console.print("the profile of this run is there already: nothing was measured")
        _print(found, out)
        return True

    if resume and world.exchange(is_finished)[0]:  # the main process decides: others may not see its folder
        leave_processes()
        return
    share = "samples" if world.count == 1 else f"samples of process 1 of {world.count}"
    counted = _Counted(inputs.samples)
    with (
        interrupts_wait() as stop_if_asked,
        resumable(state, holds_state, told=world.is_main),
        progress_bar(share, inputs.total and -(-inputs.total // world.count), shown=world.is_main) as update,
    ):

        def progress(done: int) -> None:
            update(done, tokens=counted.tokens_each)
            stop_if_asked()

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
            facts=inputs.facts,
        )
        with world.together():  # in here a signal waits: it does not lose a finished pass
            if world.is_main:
                measured.save_pretrained(out, dtype=save_dtype)
                remove_checkpoint(state)
    if world.is_main:
        _print(measured, out)
    leave_processes()


def merge(
    profiles: Annotated[list[str], typer.Argument(metavar="PROFILE...", help=f"Two or more: {options.PROFILE_HELP}.")],
    out: Annotated[Path, typer.Option(help="Folder for the merged profile.")],
) -> None:
    """Make one profile of several that were measured on different samples, each weighted by how many it saw."""
    from guided_dropout.artefacts import check_no_input, check_output_folder
    from guided_dropout.fisher import FisherProfile, profile
    from guided_dropout.fisher import merge as run

    check_no_input(out, profiles)
    check_output_folder(out, marker=profile.JSON_NAME)
    merged = run(*map(FisherProfile.from_pretrained, profiles))
    folder = merged.save_pretrained(out)
    console.print(f"{merged.num_samples:,} samples" + ("" if merged.diagonal else ", tensor means only"))
    console.print(folder)


def _print(measured: FisherProfile, folder: Path) -> None:
    from guided_dropout.fisher.coverage import told

    coverage = measured.coverage
    left_out = coverage.get("nonfinite", [])
    some = ", ".join(map(str, left_out[:10])) + (", …" if len(left_out) > 10 else "")
    console.print(
        f"{measured.num_samples:,} samples ({measured.objective}), {measured.num_skipped} without a target skipped"
        + (f", {len(left_out)} not finite left out (number {some} of the stream, from 0)" if left_out else "")
        + f"; {coverage['parameters_by_rule']:.1%} of the parameters by rule"
    )
    for sentence in told(coverage):
        console.print(sentence, markup=False, highlight=False)
    if term := measured.provenance.get("left_out"):
        console.print(f"left out of the loss: {term}")
    if ranking := measured.provenance.get("ranking"):
        console.print(_settled(ranking))
    console.print(folder)


def _settled(found: Mapping[str, Any]) -> str:
    """What a rule to stop by has found, in a line."""
    state, after = "" if found["settled"] else "not ", f"after {found['samples']:,} samples"
    if found["rule"] == "stable":
        lower = "–" if found["tau_lower"] is None else f"{found['tau_lower']:.3f}"
        return (
            f"order of the sites {state}stable {after}: {found['confidence']:.0%} of the bootstrap replicates have a "
            f"Kendall's tau of {lower} or more with it ({found['tau']:g} was asked for)"
        )
    doubtful = ", ".join(" < ".join(pair) for pair in found["undecided"])
    return (
        f"order of the sites {state}settled {after} (confidence {found['confidence']:.0%}, tolerance "
        f"{found['tolerance']:.0%})" + (f"; undecided: {doubtful}" if doubtful else "")
    )


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
