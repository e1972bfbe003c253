"""A pretrained model and labelled data, read and tokenised once for many runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from guided_dropout.data.encoding import Encoded, TokenCache, encode
from guided_dropout.data.task_data import GLUE, HOLDOUT, TaskData, load_data, load_training_data, parse_split
from guided_dropout.data.tasks import Examples, Task
from guided_dropout.models import load_classifier, load_tokenizer


class Workbench:
    """What the runs of one model share: its tokenizer, the examples of the tasks, their tokens.

    `finetune` takes one in a model's place. Nothing in it depends on what ran before.

    Args:
        model: ``"demo"``, a folder or a hub name.

    Attributes:
        model: likewise.
        tokenizer: of the model.

    Raises:
        ModelError: see `models.load_tokenizer`.
    """

    def __init__(self, model: str | Path):
        self.model = model
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(model)
        self._data: dict[str, TaskData] = {}
        self._training: dict[str, tuple[Task, Examples, tuple[str, ...]]] = {}  # of which a part is held out
        self._tokens: dict[int, TokenCache] = {}

    def classifier(self, num_labels: int, *, head_seed: int) -> PreTrainedModel:
        """The pretrained model with a new head: a fresh copy each time; see `models.load_classifier`.

        Its file is read each time: 0.1 s for 33 million parameters, of which a copy kept in memory would take half.
        """
        return load_classifier(self.model, num_labels, head_seed=head_seed)

    def data(
        self, task: Task | str | None, data: Any = None, *, split: str = GLUE, seed: int = 0, **options: Any
    ) -> TaskData:
        """What `task_data.load_data` gives; files and hub data sets are read once."""
        if isinstance(data, (tuple, TaskData)):
            return load_data(task, data, split=split, seed=seed, **options)
        kind, _ = parse_split(split)
        # By what they print: tasks and lists have no hash.
        key = repr((task, data and str(data), kind == HOLDOUT, options))
        if kind == HOLDOUT:
            metrics = options.pop("metrics", ())
            if key not in self._training:
                self._training[key] = load_training_data(task, data, **options)
            known, train, notes = self._training[key]
            dealt = load_data(known, (train, train), split=split, seed=seed, metrics=metrics)
            return replace(dealt, notes=(*notes, *dealt.notes))
        if key not in self._data:
            self._data[key] = load_data(task, data, **options)
        whole = self._data[key]
        if kind == GLUE:
            return whole
        dealt = load_data(whole.task, (whole.train, whole.validation), split=split, seed=seed)
        return replace(dealt, more=whole.more, notes=whole.notes)

    def encoded(self, examples: Examples, task: Task, max_length: int) -> Encoded:
        """What `encoding.encode` gives; each text is tokenised once."""
        return encode(examples, task, self.tokenizer, max_length, self._tokens.setdefault(max_length, {}))
