"""What commands that measure a model are given: its name, and a text or a task → the model loaded, and samples."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from guided_dropout.cli.console import console, progress_bar
from guided_dropout.cli.shared import choose
from guided_dropout.errors import DataError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from guided_dropout.inputs import Inputs
    from guided_dropout.texts import Text


@dataclass(frozen=True, kw_only=True)
class Given:
    """A model and what it is measured on, by the options of these names; checked before anything is read.

    Raises:
        DataError: not one of text and task, an unknown dtype, or no number of samples.
    """

    model: str
    text: str | None
    task: str | None = None
    data: str | None = None
    columns: str | None = None
    samples: str
    max_characters: int | None
    max_length: int
    objective: str
    dtype: str
    device_map: str | None = None
    seed: int

    def __post_init__(self) -> None:
        if (self.text is None) == (self.task is None) or (self.task is None and (self.data or self.columns)):
            columns = f", --columns {self.columns}" if self.columns else ""
            raise DataError(
                f"--text {self.text}, --task {self.task}, --data {self.data}{columns}; expected --text, or "
                "--task with its --data and --columns"
            )
        if self.max_characters is not None and self.max_characters < 1:
            raise DataError(f"at most {self.max_characters} characters; expected at least 1")
        _ = self.precision, self.number

    @property
    def precision(self) -> torch.dtype:
        """Of the weights."""
        from guided_dropout.models import DTYPES

        return choose("--dtype", self.dtype, DTYPES)

    @property
    def number(self) -> int | None:
        """How many samples are drawn; None for all, in their order."""
        from guided_dropout.inputs import number_of_samples

        return number_of_samples(self.samples)

    def load(self, *, shown: bool = True) -> tuple[PreTrainedModel, Inputs]:
        """The model, and the samples with their facts, to which those of this command are added.

        Args:
            shown: whether this process shows how far it is, and says what a person should know of the samples.

        Raises:
            DataError, ModelError: the text, the data or the model cannot be read, or do not belong together.
        """
        from guided_dropout import inputs
        from guided_dropout.models import load_lm, load_model, load_tokenizer

        drawn: dict[str, Any] = {"num_samples": self.number, "max_length": self.max_length, "seed": self.seed}
        if self.text is not None:
            limit = inputs.MAX_CHARACTERS if self.max_characters is None and self.number else self.max_characters
            lines = open_text(self.text, limit)
            model = load_lm(self.model, self.objective, self.precision, self.device_map)
            tokenizer = load_tokenizer(self.model)
            with progress_bar("blocks of text", None, shown=shown) as update:
                given = inputs.text_inputs(model, tokenizer, lines, **drawn, progress=update)
        else:
            model, tokenizer = load_model(self.model, self.precision, self.device_map), load_tokenizer(self.model)
            given = inputs.task_inputs(model, tokenizer, str(self.task), self.data, self.columns, **drawn)
        if shown:
            for note in given.notes:
                console.print(note)
        return model, replace(given, facts={"source": self.model, "samples": self.samples, **given.facts})


def open_text(text: str, max_characters: int | None) -> Text:
    """``demo``, a file, a folder or a hub data set → its paragraphs; see `texts.stream_text`."""
    from guided_dropout.texts import Text, stream_text

    if text != "demo":
        return stream_text(text, max_characters=max_characters)
    from guided_dropout.demo.text import demo_paragraphs

    return Text(text, lambda: iter(demo_paragraphs()), max_characters)
