"""One fine-tuning run: model + task + arm + seeds → `RunResult`, on the transformers Trainer."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from guided_dropout.arms import ARMS, choose_arm
from guided_dropout.artefacts import check_output_folder
from guided_dropout.data.columns import Columns
from guided_dropout.data.task_data import TaskData
from guided_dropout.data.tasks import Examples, Task, subset
from guided_dropout.errors import ModelError
from guided_dropout.fisher import FisherProfile
from guided_dropout.fisher.processes import check_alone
from guided_dropout.identity import model_record
from guided_dropout.models import drawn_parameters, positions_of
from guided_dropout.provenance import provenance
from guided_dropout.recipe import Recipe
from guided_dropout.regularizers import Context, apply_dropout
from guided_dropout.regularizers.residual import added_sites
from guided_dropout.results import JSON_NAME, RunResult, Seeds
from guided_dropout.samples import vocabulary_size
from guided_dropout.schedule import DropoutSchedule
from guided_dropout.training import ORDER, kept_random_state, precision_of, train_classifier
from guided_dropout.vocabulary import occurring_rows
from guided_dropout.workbench import Workbench

__all__ = ["ARMS", "RunResult", "Seeds", "finetune"]


def finetune(
    model: str | Path | Workbench,
    task: Task | str | None = None,
    *,
    data: str | Path | tuple[Examples, Examples] | TaskData | None = None,
    eval_data: str | Path | None = None,
    columns: Columns | str | None = None,
    metrics: Sequence[str] | str = (),
    hub_splits: Sequence[str] | str = (),
    split: str = "glue",
    arm: str = "guided",
    arm_parameters: Mapping[str, Any] | Sequence[str] = (),
    schedule: DropoutSchedule | None = None,
    profile: FisherProfile | None = None,
    seed: int = 0,
    seeds: Seeds | None = None,
    train_fraction: float = Recipe.train_fraction,
    epochs: int = Recipe.epochs,
    batch_size: int = Recipe.batch_size,
    learning_rate: float = Recipe.learning_rate,
    warmup_ratio: float = Recipe.warmup_ratio,
    weight_decay: float = Recipe.weight_decay,
    max_length: int | None = None,
    rate: float = Recipe.rate,
    device: str = Recipe.device,
    precision: str = Recipe.precision,
    evaluate: str = Recipe.evaluate,
    residual_sites: bool = Recipe.residual_sites,
    out: str | Path | None = None,
    told: Callable[[str], Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> RunResult:
    """Fine-tune a pretrained model on a task under one arm, and evaluate it.

    AdamW with betas 0.9 and 0.999, linear warm-up then linear decay to 0, gradients clipped to norm 1, batches drawn at
    random. The arms put their rates on the same sites of the backbone; the head's own dropout is left as it is in all
    of them. Runs with the same seeds start from the same weights and see the same batches, whatever their arm, and as
    far as it draws the same numbers, with the same noise.

    Only the rows of the token table that occur in the data are trained (`vocabulary.occurring_rows`), unless the arm's
    regularizer goes by that table: the others have no gradient, and stay what they are even with weight decay. On a CPU
    a batch is run in parts of like lengths, unless its examples share their noise (mixout): less padding, and the whole
    batch's gradient wherever padding has no part in what a model makes of an example (`parts.parts_of_like_lengths`).

    Args:
        model: ``"demo"``, a folder or a hub name; or a `Workbench`, which keeps what several runs share.
        task: a task, the name of one in `tasks.TASKS`, or a hub data set, ``"owner/name"`` or ``"owner/name:config"``.
        data: a GLUE folder, a data set laid out like the hub's, a file of your own, a pair (train, validation) of
            examples, or what `task_data.load_data` gave.
        eval_data: file to evaluate on; this and the next four are explained at `task_data.load_data`.
        columns: where texts and label stand, ``"text=premise,hypothesis:label=gold"``.
        metrics: names in `tasks.METRICS`, the main one first.
        hub_splits: names of a hub data set's splits to train and evaluate on.
        split: ``"glue"`` (the evaluation split as it comes), ``"paper"`` (training and evaluation examples pooled and
            dealt 80:20 by ``seeds.subset``) or ``"holdout:0.2"`` (a share of the training examples).
        arm: a name in `arms.ARMS`, such as ``"guided"`` (the schedule), ``"uniform"`` (the schedule's mean rate at each
            site) or ``"dropout"`` (`rate` at each site, the standard baseline), with parameters if need be:
            ``"mixout:p=0.9"``.
        arm_parameters: parameters of the arm, by name or as ``"name=value"``.
        schedule: needed by guided arms and controls.
        profile: needed by arms that go by Fisher information themselves.
        seed: one number from which `seeds` are derived.
        seeds: the seeds one by one, in place of `seed`.
        train_fraction: part of the training data that is used, drawn by ``seeds.subset``.
        epochs: passes over it.
        batch_size: examples in a step.
        learning_rate: its peak.
        warmup_ratio: share of the steps until the peak.
        weight_decay: AdamW's, on all but biases and norms.
        max_length: tokens at which a text is cut, or the model's own limit where that is less, which is told; None is
            128 or that limit.
        rate: of plain dropout, in all arms that do not set the rates themselves.
        device: ``"auto"`` or ``"cpu"``.
        precision: ``"float32"``, ``"bfloat16"`` (autocast), or ``"auto"``: bfloat16 on a GPU that has it.
        evaluate: after each ``"epoch"``, or at the ``"end"`` alone.
        residual_sites: give the model dropout on what its blocks write to the residual stream, where it is built
            without (`add_residual_sites`); the schedule must have been made for these sites.
        out: folder for ``result.json``, checked before training and written after it; None writes nothing.
        told: called, before training, with each sentence that a person should know: of the data, of a schedule or
            profile of other weights, of a `max_length` that is cut.
        progress: called after each step with the steps done and the steps in all.

    Raises:
        ProcessError: a launcher started several processes.
        ScheduleError: an unknown arm or parameter; the arm needs a schedule or profile, or it is for another model; a
            control that is the schedule itself.
        DataError, ModelError: see `task_data.load_data` and `models.load_classifier`.
        ArtefactError: `out` cannot be written.
    """
    start = time.perf_counter()
    # What can go wrong at once goes wrong before the data are read, which may take minutes.
    check_alone()
    chosen = choose_arm(arm, arm_parameters)
    context = Context(rate=rate, schedule=schedule, profile=profile)
    chosen.check(context)
    if out is not None:
        check_output_folder(out, marker=JSON_NAME)
    length = Recipe.max_length if max_length is None else max_length
    recipe = Recipe(
        train_fraction, epochs, batch_size, learning_rate, warmup_ratio, weight_decay, length, rate, device, precision,
        evaluate, residual_sites,
    )  # fmt: skip
    seeds = seeds or Seeds.derive(seed)

    bench = model if isinstance(model, Workbench) else Workbench(model)
    given = bench.data(
        task,
        data,
        eval_data=eval_data,
        columns=columns,
        metrics=metrics,
        hub_splits=hub_splits,
        split=split,
        seed=seeds.subset,
    )
    if told:
        for note in given.notes:
            told(note)
    task = given.task
    train = subset(given.train, train_fraction, seeds.subset)
    classifier = bench.classifier(task.num_labels, head_seed=seeds.head)
    for known in (schedule, profile):
        if told and known is not None and (note := known.weights_note(classifier)):
            told(note)
    if told and max_length is not None and (note := cut_note(max_length, bench.tokenizer, classifier)):
        told(note)
    recipe = replace(recipe, max_length=fitting_length(length, bench.tokenizer, classifier))
    encoded, held_out, *rest = (
        bench.encoded(examples, task, recipe.max_length) for examples in (train, given.validation, *given.more.values())
    )
    more = dict(zip(given.more, rest, strict=True))
    padding: Any = bench.tokenizer.pad_token_id
    tokens: set[int] = {padding}.union(*(e.tokens() for e in (encoded, held_out, *rest)))
    _check_vocabulary(max(tokens), classifier)

    context = replace(context, new=drawn_parameters(classifier))
    digest = _digest_weights(classifier)
    with kept_random_state(), added_sites(classifier, residual_sites):
        rates = chosen.rates(classifier, context)
        chosen.check_apart(rates, context)
        few_rows = occurring_rows(classifier, tokens, encoded.sample())
        with (
            apply_dropout(classifier, rates),
            chosen.apply(classifier, context) as handle,
            contextlib.nullcontext() if chosen.holds_weights else few_rows,
        ):
            run = train_classifier(
                classifier, bench.tokenizer, task, encoded, held_out, recipe, seeds, progress, handle, more
            )

    last = run.history[-1]
    result = RunResult(
        task=task.name,
        arm=chosen.label,
        metric=task.main_metric,
        value=None if run.diverged else last["metrics"][task.main_metric],
        metrics={**last.get("metrics", dict.fromkeys(task.metrics)), **run.more},
        history=run.history,
        diverged=run.diverged,
        collapsed=run.collapsed,
        seeds=seeds,
        recipe=recipe_facts(recipe, given, len(train)),
        rates=_summary(rates),
        pairing={"weights": digest, "batches": encoded.digest(), "evaluation": given.validation.digest()},
        model=model_record(classifier),
        times={**run.times, "total": time.perf_counter() - start},
        provenance=provenance(device=run.device),
        arm_parameters=chosen.parameters,
        arm_facts=handle.facts,
    )
    if out is not None:
        result.save(out)
    return result


def fitting_length(max_length: int, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> int:
    """The tokens at which texts are cut: `max_length`, or the limit of the tokenizer or model where that is less."""
    return min(max_length, tokenizer.model_max_length, positions_of(model) or max_length)


def cut_note(max_length: int, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> str | None:
    """A sentence where texts are cut at fewer tokens than `max_length`."""
    fitting = fitting_length(max_length, tokenizer, model)
    if fitting == max_length:
        return None
    all_that = "the model has positions for" if fitting == positions_of(model) else "its tokenizer takes"
    return f"note: max length {max_length}; texts are cut at {fitting} tokens, all that {all_that}"


def _check_vocabulary(largest_id: int, model: PreTrainedModel) -> None:
    rows = vocabulary_size(model)
    if largest_id >= rows:
        raise ModelError(
            f"the tokenizer gives the token {largest_id}; expected less than {rows}, the model's vocabulary: "
            "use the tokenizer that the model was pretrained with"
        )


def recipe_facts(recipe: Recipe, data: TaskData, n_train: int) -> dict[str, Any]:
    """What a result says of how a run is trained, with `n_train` examples."""
    return {
        **asdict(recipe),
        "precision": precision_of(recipe),
        "optimizer": "adamw(0.9, 0.999)",
        "decay": "linear",
        "max_grad_norm": 1.0,
        "order": ORDER,
        "n_train": n_train,
        "n_eval": len(data.validation),
        "train_data": data.train.source,
        "eval_data": data.validation.source,
        "split": data.split,
        "labels": data.task.labels and list(data.task.labels),
        **{f"n_eval_{name}": len(examples) for name, examples in data.more.items()},
        **{f"eval_{name}_data": examples.source for name, examples in data.more.items()},
    }


def _summary(schedule: DropoutSchedule) -> dict[str, Any]:
    rates = list(schedule.rates.values())
    return {
        "shape": schedule.shape,
        "sites": len(rates),
        "mean": schedule.mean_rate,
        "min": min(rates),
        "max": max(rates),
    }


def _digest_weights(model: PreTrainedModel) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]
