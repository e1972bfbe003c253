"""A pretrained model and labelled data, read and tokenised once for many runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from guided_dropout.encoding import Encoded, TokenCache, encode
from guided_dropout.models import load_classifier, load_tokenizer
from guided_dropout.tasks import Examples, Task, load_task


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
        self._examples: dict[Any, Examples] = {}
        self._tokens: dict[int, TokenCache] = {}

    def classifier(self, num_labels: int, *, head_seed: int) -> PreTrainedModel:
        """The pretrained model with a new head: a fresh copy each time; see `models.load_classifier`."""
        return load_classifier(self.model, num_labels, head_seed=head_seed)

    def examples(self, task: Task, data: str | Path | None, split: str) -> Examples:
        """What `tasks.load_task` gives, read once."""
        key = (task, None if data is None else str(data), split)
        if key not in self._examples:
            self._examples[key] = load_task(task, data, split)
        return self._examples[key]

    def encoded(self, examples: Examples, task: Task, max_length: int) -> Encoded:
        """What `encoding.encode` gives; each text is tokenised once."""
        return encode(examples, task, self.tokenizer, max_length, self._tokens.setdefault(max_length, {}))
