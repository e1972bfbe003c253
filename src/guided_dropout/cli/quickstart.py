"""The whole workflow in one call, on the embedded model and text; killed and rerun, it does only what is missing."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from guided_dropout import corpus
from guided_dropout.artefacts import check_output_folder, read_json, write_json
from guided_dropout.bench.report import write_report
from guided_dropout.cli.console import console as terminal
from guided_dropout.cli.console import progress_bar, site_table
from guided_dropout.demo.task import SWAPPED_WORDS, swapped_words
from guided_dropout.demo.text import demo_paragraphs, text_digest
from guided_dropout.errors import ArtefactError, DataError
from guided_dropout.finetune import finetune
from guided_dropout.fisher import FisherProfile, estimate_fisher
from guided_dropout.models import load_classifier, load_lm, load_tokenizer
from guided_dropout.regularizers import dropout_table
from guided_dropout.results import JSON_NAME, RunResult, Seeds
from guided_dropout.schedule import DropoutSchedule

KIND = "quickstart"
SCHEMA = 1
SETTINGS_NAME = "quickstart.json"
ARMS = ("dropout", "uniform", "guided")

_NOTES = (
    "This is a toy: a model of under two million parameters, a task made by rule, a few hundred sentences. It shows "
    "the workflow. What it finds, either way, says nothing about real models and tasks.",
    "How many words the task swaps was settled by looking at other draws of these same sentences, with plain and with "
    "no dropout; epochs, batch size and learning rate on training sentences alone, with plain dropout.",
)


@dataclass(frozen=True)
class Settings:
    """What the quickstart does, but for the number of seeds.

    Attributes:
        fisher_samples: samples of text that the Fisher information is measured on.
        fisher_length: tokens in each.
        train_sentences: sentences to train on; each occurs as written and swapped.
        validation_sentences: likewise.
        epochs: passes over the training data.
        batch_size: examples in a step.
        learning_rate: its peak; high, because the model is small.
        rate: of the arm ``"dropout"``, and the guided schedule's highest.
    """

    fisher_samples: int = 256
    fisher_length: int = 64
    train_sentences: int = 400
    validation_sentences: int = 200
    epochs: int = 2
    batch_size: int = 32
    learning_rate: float = 6e-4
    rate: float = 0.1


def quickstart(
    out: str | Path,
    *,
    seeds: int = 5,
    model: str | Path = "demo",
    settings: Settings | None = None,
    console: Console = terminal,
) -> list[Path]:
    """Measure, schedule, fine-tune arm by arm over paired seeds, and report.

    Args:
        out: folder for all of it: ``report.html``, ``report.md``, ``fisher/``, ``schedule.json``,
            ``runs/<arm>-<seed>/result.json``. What an earlier call with the same settings left there is kept.
        seeds: paired restarts of each arm, numbered from 0.
        model: a masked language model; ``"demo"`` is the embedded one.
        settings: the numbers; by default those that fit the embedded model.
        console: where to tell what is being done.

    Returns:
        Paths of the reports, the profile, the schedule and the folder of the runs.

    Raises:
        DataError: fewer than one seed, or this Python lacks the text.
        ArtefactError: `out` cannot be written, or holds something else or the results of other settings.
    """
    if seeds < 1:
        raise DataError(f"found {seeds} seeds; expected at least 1, and 3 or more for an interval")
    settings = settings or Settings()
    out = check_output_folder(out, marker=SETTINGS_NAME)
    _claim(out, str(model), settings)

    console.print("[bold]1[/] Fisher information of the pretrained weights", markup=True)
    profile = _profile(out / "fisher", model, settings)
    console.print(f"  {profile.num_samples} samples of {settings.fisher_length} tokens, text from Python's own help")

    console.print("[bold]2[/] Dropout rates: the more a site's weights know, the lower", markup=True)
    classifier = load_classifier(model, SWAPPED_WORDS.num_labels, head_seed=0)
    schedule = DropoutSchedule.from_profile(profile, classifier, upper=settings.rate)
    schedule_file = schedule.save(out / "schedule.json")
    table = dropout_table(classifier, schedule, profile)
    console.print(site_table(table))

    what = f"{len(ARMS)} arms × {seeds} seeds on the task '{SWAPPED_WORDS.name}'"
    console.print(f"[bold]3[/] Fine-tuning: {what}", markup=True)
    results = _runs(out / "runs", model, schedule, seeds, settings)

    console.print("[bold]4[/] Report", markup=True)
    reports = write_report(
        out,
        title="guided-dropout quickstart",
        results=results,
        profile=profile,
        table=table,
        introduction=[
            "A small masked language model is fine-tuned to tell whether some neighbouring words of a sentence were "
            "swapped, with standard dropout, with guided dropout, and with as much dropout as guided but the "
            "same everywhere."
        ],
        notes=_NOTES,
        commands=[f"guided-dropout quickstart --out {shlex.quote(str(out))} --seeds {seeds}"],
    )
    return [*reports, out / "fisher", schedule_file, out / "runs"]


def _claim(out: Path, model: str, settings: Settings) -> None:
    """Write what `out` is made with, or make sure that it is what an earlier call wrote there."""
    wanted = {"model": model, **asdict(settings), "text": text_digest(demo_paragraphs())}
    file = out / SETTINGS_NAME
    if file.exists():
        found = read_json(file, kind=KIND, schema=SCHEMA).get("settings", {})
        odd = [key for key in wanted if found.get(key) != wanted[key]]
        if odd:
            raise ArtefactError(
                f"{out} was made with {odd[0]} {found.get(odd[0])!r}; expected {wanted[odd[0]]!r}: choose another --out"
            )
        return
    write_json(file, {"kind": KIND, "schema": SCHEMA, "settings": wanted})


def _profile(folder: Path, model: str | Path, settings: Settings) -> FisherProfile:
    if folder.exists():
        return FisherProfile.from_pretrained(folder)
    texts = demo_paragraphs()
    samples = corpus.lm_samples(
        texts,
        load_tokenizer(model),
        objective="mlm",
        num_samples=settings.fisher_samples,
        max_length=settings.fisher_length,
    )
    facts = {"text": f"pydoc_data.topics, {text_digest(texts)}", "seed": 0}
    with progress_bar("Fisher", len(samples)) as update:
        profile = estimate_fisher(load_lm(model, "mlm"), samples, progress=lambda done: update(done, None), facts=facts)
    profile.save_pretrained(folder)
    return profile


def _runs(
    folder: Path, model: str | Path, schedule: DropoutSchedule, seeds: int, settings: Settings
) -> list[RunResult]:
    """All arms of a seed before the next seed, so that what an interrupted call leaves behind is paired."""
    data = swapped_words(num_train=settings.train_sentences, num_validation=settings.validation_sentences)
    recipe = {name: getattr(settings, name) for name in ("epochs", "batch_size", "learning_rate", "rate")}
    results = []
    with progress_bar("runs", len(ARMS) * seeds) as update:
        for seed in range(seeds):
            for arm in ARMS:
                place = folder / f"{arm}-{seed}"
                results.append(
                    _kept(place, arm, seed, {**recipe, "train_data": data[0].source, "eval_data": data[1].source})
                    if (place / JSON_NAME).exists()
                    else finetune(
                        model, SWAPPED_WORDS, data=data, arm=arm, schedule=schedule, seed=seed, out=place, **recipe
                    )
                )
                update(len(results), None)
    return sorted(results, key=lambda r: ARMS.index(r.arm))


def _kept(place: Path, arm: str, seed: int, recipe: dict[str, Any]) -> RunResult:
    """The result of an earlier call, if it is the one that this call would make."""
    result = RunResult.load(place)
    found = {"arm": result.arm, "seeds": result.seeds, **{key: result.recipe.get(key) for key in recipe}}
    for key, wanted in {"arm": arm, "seeds": Seeds.derive(seed), **recipe}.items():
        if found[key] != wanted:
            raise ArtefactError(
                f"{place} holds a run with {key} {found[key]!r}; expected {wanted!r}: remove it or choose another --out"
            )
    return result
