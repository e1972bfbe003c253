"""A pretrained model and labelled data, read and tokenised once for many runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from guided_dropout.data.encoding import Encoded, TokenCache, encode
from guided_dropout.data.task_data import GLUE, PAPER, TaskData, load_data
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
        self._tokens: dict[int, TokenCache] = {}

    def classifier(self, num_labels: int, *, head_seed: int) -> PreTrainedModel:
        """The pretrained model with a new head: a fresh copy each time; see `models.load_classifier`."""
        return load_classifier(self.model, num_labels, head_seed=head_seed)

    def data(
        self, task: Task | str | None, data: Any = None, *, split: str = GLUE, seed: int = 0, **options: Any
    ) -> TaskData:
        """What `task_data.load_data` gives; files and hub data sets are read once."""
        if isinstance(data, (tuple, TaskData)):
            return load_data(task, data, split=split, seed=seed, **options)
        read = GLUE if split == PAPER else split
        # By what they print: tasks and lists have no hash.
        key = repr((task, data and str(data), read, seed if read != GLUE else None, options))
        if key not in self._data:
            self._data[key] = load_data(task, data, split=read, seed=seed, **options)
        whole = self._data[key]
        if split == read:
            return whole
        dealt = load_data(whole.task, (whole.train, whole.validation), split=split, seed=seed)
        return replace(dealt, more=whole.more, notes=whole.notes)

    def encoded(self, examples: Examples, task: Task, max_length: int) -> Encoded:
        """What `encoding.encode` gives; each text is tokenised once."""
        return encode(examples, task, self.tokenizer, max_length, self._tokens.setdefault(max_length, {}))
