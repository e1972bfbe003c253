"""One training of a classifier, on the transformers Trainer."""

from __future__ import annotations

import contextlib
import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from guided_dropout.data.encoding import Encoded
from guided_dropout.data.tasks import Task, compute_metrics
from guided_dropout.masks import quick_masks
from guided_dropout.models import quiet
from guided_dropout.parts import parts_of_like_lengths
from guided_dropout.recipe import Recipe
from guided_dropout.regularizers import Handle
from guided_dropout.results import Seeds

ORDER = "batches drawn at random"
"""What a recipe says of the order of the training examples."""
_EVAL_BATCH = 64


@dataclass(frozen=True)
class Training:
    """What `train_classifier` saw: see the same names in `results.RunResult`.

    Attributes:
        more: metrics of further evaluation splits after the last epoch, the split's name behind the metric's.
    """

    history: list[dict[str, Any]]
    collapsed: bool
    times: dict[str, float]
    device: str
    more: dict[str, float | None] = field(default_factory=dict)

    @property
    def diverged(self) -> bool:
        """Whether a loss or metric was not a finite number."""
        return any(
            None in (epoch["train_loss"], epoch.get("eval_loss", 0.0), *epoch.get("metrics", {}).values())
            for epoch in self.history
        )


class _Evaluator:
    """The Trainer's `compute_metrics`; keeps whether the latest predictions were all one class."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.collapsed = False

    def __call__(self, output: EvalPrediction) -> dict[str, float]:
        logits = np.asarray(output.predictions)
        if not np.isfinite(logits).all():
            self.collapsed = False
            return dict.fromkeys(self.task.metrics, math.nan)
        predictions = logits[:, 0] if self.task.is_regression else logits.argmax(axis=-1)
        self.collapsed = not self.task.is_regression and bool((predictions == predictions[0]).all())
        return compute_metrics(self.task, predictions, output.label_ids)


class _Steps(TrainerCallback):
    """Reports each step, and ends a run whose loss is no number any more."""

    def __init__(self, progress: Callable[[int, int], None] | None) -> None:
        self.progress = progress

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.progress:
            self.progress(state.global_step, state.max_steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        if not math.isfinite((logs or {}).get("loss", 0.0)):
            control.should_training_stop = True


class _Trainer(Trainer):
    """Asks a regularizer's handle for the loss and the optimizer's parameter groups; runs batches in parts on a CPU."""

    def __init__(self, handle: Handle, *args: Any, **options: Any) -> None:
        self._handle = handle
        self._share = 1.0
        super().__init__(*args, **options)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Forward and backward of a batch: the batch's mean loss and its gradient, in however many passes."""
        # A GPU takes longer for two small batches than for one with padding.
        whole = self.args.device.type != "cpu" or self._handle.whole_batches
        losses = []
        for part, self._share in [(inputs, 1.0)] if whole else parts_of_like_lengths(inputs):
            losses.append(super().training_step(model, part))
        return torch.stack(losses).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss; in evaluation the plain one."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            loss = self._share * self._handle.loss(loss, model, inputs, outputs)
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The usual optimizer, with the handle's parameter groups."""
        optimizer = super().create_optimizer(model)
        groups = self._handle.parameter_groups(optimizer.param_groups)
        optimizer.param_groups.clear()
        for group in groups:
            if group["params"]:
                optimizer.add_param_group(group)
        return optimizer


def train_classifier(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    train: Encoded,
    validation: Encoded,
    recipe: Recipe,
    seeds: Seeds,
    progress: Callable[[int, int], None] | None,
    handle: Handle | None = None,
    more: Mapping[str, Encoded] | None = None,
) -> Training:
    """Train `model` in place, with the dropout rates that it has, and evaluate it after each epoch.

    Args:
        model: a sequence classifier with as many outputs as `task` has labels.
        tokenizer: pads the batches.
        task: says what is measured.
        train: examples to train on; afterwards their digest tells in which order they were read.
        validation: examples to evaluate on.
        recipe: numbers.
        seeds: of the order and of the noise; the random state of the process is lost (see `kept_random_state`).
        progress: called after each step with the steps done and the steps in all.
        handle: of the regularizer that stands on the model.
        more: further examples to evaluate on after the last epoch, by a short name.
    """
    evaluator = _Evaluator(task)
    with tempfile.TemporaryDirectory(prefix="guided-dropout-") as scratch, quiet(), quick_masks(), _own_precision():
        args = _arguments(scratch, recipe, seeds, len(train))
        trainer = _Trainer(
            handle or Handle(),
            model,
            args,
            data_collator=DataCollatorWithPadding(tokenizer),
            train_dataset=train,
            eval_dataset=validation.by_length(),
            processing_class=tokenizer,
            compute_metrics=evaluator,
            callbacks=[_Steps(progress)],
            preprocess_logits_for_metrics=lambda logits, _: logits[0] if isinstance(logits, tuple) else logits,
        )
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        if recipe.evaluate == "end" and all(map(math.isfinite, losses)):
            trainer.evaluate()
        seconds = time.perf_counter() - start
        log, collapsed = list(trainer.state.log_history), evaluator.collapsed
        further = [
            (name, trainer.evaluate(examples.by_length(), metric_key_prefix=name))
            for name, examples in (more or {}).items()
        ]
    evaluation = sum(entry["eval_runtime"] for entry in log if "eval_runtime" in entry)
    return Training(
        history=_history(log, task),
        collapsed=collapsed,
        times={"train": seconds - evaluation, "eval": evaluation + sum(m[f"{name}_runtime"] for name, m in further)},
        device=str(args.device),
        more={f"{key}_{name}": _finite(m[f"{name}_{key}"]) for name, m in further for key in task.metrics},
    )


@contextlib.contextmanager
def _own_precision() -> Iterator[None]:
    """Leave the precision to the recipe: the Trainer takes one from accelerate's environment where it is told none."""
    name = "ACCELERATE_MIXED_PRECISION"
    given = os.environ.pop(name, None)
    try:
        yield
    finally:
        if given is not None:
            os.environ[name] = given


def _on_gpu(recipe: Recipe) -> bool:
    return recipe.device != "cpu" and torch.cuda.is_available()


def precision_of(recipe: Recipe) -> str:
    """What a training on this machine makes of a recipe's precision: ``"float32"`` or ``"bfloat16"``."""
    half = recipe.precision == "bfloat16" or (
        recipe.precision == "auto" and _on_gpu(recipe) and torch.cuda.is_bf16_supported(including_emulation=False)
    )
    return "bfloat16" if half else "float32"


def _arguments(scratch: str, recipe: Recipe, seeds: Seeds, n_train: int) -> TrainingArguments:
    steps = recipe.epochs * math.ceil(n_train / recipe.batch_size)
    args = TrainingArguments(
        output_dir=scratch,
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=_EVAL_BATCH,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="linear",
        # The first step of a warm-up has a rate of 0; an only one would train nothing.
        warmup_steps=math.ceil(recipe.warmup_ratio * steps) if steps > 1 else 0,
        weight_decay=recipe.weight_decay,
        optim="adamw_torch_fused",
        adam_beta1=0.9,
        adam_beta2=0.999,
        max_grad_norm=1.0,
        bf16=precision_of(recipe) == "bfloat16",
        seed=seeds.noise,
        data_seed=seeds.order,
        eval_strategy="epoch" if recipe.evaluate == "epoch" else "no",
        logging_strategy="epoch",
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=recipe.device == "cpu" or not torch.accelerator.is_available(),  # else it refuses half precision
        dataloader_pin_memory=_on_gpu(recipe),
    )
    args._n_gpu = min(args.n_gpu, 1)  # Several GPUs would silently multiply the batch size.
    return args


def _history(log: list[dict[str, Any]], task: Task) -> list[dict[str, Any]]:
    losses = [entry for entry in log if "loss" in entry]
    history = [{"epoch": n, "train_loss": _finite(entry["loss"])} for n, entry in enumerate(losses, start=1)]
    evaluations = [entry for entry in log if "eval_loss" in entry]
    for epoch, evaluation in zip(history[len(history) - len(evaluations) :], evaluations, strict=True):
        epoch["eval_loss"] = _finite(evaluation["eval_loss"])
        epoch["metrics"] = {name: _finite(evaluation[f"eval_{name}"]) for name in task.metrics}
    return history


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


@contextlib.contextmanager
def kept_random_state() -> Iterator[None]:
    """Give Python, NumPy and torch their random state back: the Trainer seeds them all."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
