"""Train the rows of the token table that occur, and no others: the rest of it has no gradient and would not move."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from guided_dropout.errors import ModelError


@contextlib.contextmanager
def occurring_rows(model: PreTrainedModel, tokens: Collection[int], sample: Mapping[str, Tensor]) -> Iterator[None]:
    """Give a model, for the time of a block, a token table of the rows that occur.

    The table is most of a small model: a step of AdamW with all of it takes time and memory for thousands of rows
    whose gradients and moments are zero. Losses and gradients are what they are with the whole table; afterwards that
    is back in place, trained rows in it. Weight decay, which would act on all rows, acts on those that occur.

    A model whose table has another use as well (a head that is tied to it), does not train, or is no plain
    ``nn.Embedding`` keeps it.

    Args:
        model: its parameters must not be held by anyone else in the meantime (an optimizer of the block's own may).
        tokens: all that will occur within the block.
        sample: inputs of the model; it is run once, without gradients, to see which tokens it adds itself.

    Raises:
        ModelError: within the block, a token that is not among them; on a GPU at its end.
    """
    tables = _tables(model)
    if not tables:
        yield
        return
    whole = cast(nn.Parameter, tables[0].weight)
    rows = torch.tensor(sorted({*tokens, *_added(model, tables, sample)}), device=whole.device)
    place = torch.full((len(whole),), -1, device=whole.device)
    place[rows] = torch.arange(len(rows), device=whole.device)
    few = nn.Parameter(whole.detach()[rows])
    padding = [table.padding_idx for table in tables]
    numbered = _Numbered(place)
    with contextlib.ExitStack() as undo:
        for table, index in zip(tables, padding, strict=True):
            undo.callback(_put, table, whole, index)
            # The padding's row, which gets no gradient, may not be among them.
            _put(table, few, None if index is None or place[index] < 0 else int(place[index]))
            undo.callback(table.register_forward_pre_hook(numbered, with_kwargs=True).remove)
        try:
            yield
        finally:
            with torch.no_grad():
                whole.data = whole.data.to(few)  # where the model was moved to meanwhile
                whole[rows.to(few.device)] = few
    numbered.check()


def _tables(model: PreTrainedModel) -> list[nn.Embedding]:
    """The modules that hold the token table, if all of them are plain embeddings that train."""
    table = model.get_input_embeddings()
    weight = getattr(table, "weight", None)
    holders = [m for m in model.modules() if any(p is weight for p in m.parameters(recurse=False))]
    tables = [m for m in holders if isinstance(m, nn.Embedding) and _plain(m)]
    return tables if weight is not None and weight.requires_grad and len(tables) == len(holders) else []


def _plain(table: nn.Embedding) -> bool:
    return table.max_norm is None and not table.scale_grad_by_freq and not table.sparse


def _put(table: nn.Embedding, weight: nn.Parameter, padding: int | None) -> None:
    table.weight, table.num_embeddings, table.padding_idx = weight, len(weight), padding


def _added(model: PreTrainedModel, tables: list[nn.Embedding], sample: Mapping[str, Tensor]) -> set[int]:
    seen: set[int] = set()
    training = model.training
    with contextlib.ExitStack() as undo, torch.no_grad():
        undo.callback(model.train, training)
        for table in tables:
            hook = table.register_forward_pre_hook(
                lambda _, args, options: seen.update(_ids(args, options).unique().tolist()), with_kwargs=True
            )
            undo.callback(hook.remove)
        model.eval()
        model(**sample)
    return seen


def _ids(args: tuple[Any, ...], options: Mapping[str, Any]) -> Tensor:
    ids: Tensor = args[0] if args else options["input"]
    return ids


class _Numbered:
    """The hook by which a table is given the numbers of its rows, in the tokens' place."""

    def __init__(self, place: Tensor):
        self._place = place
        self._strange: Tensor | None = None  # a token without a row; -1 where there was none

    def __call__(
        self, _: nn.Module, args: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ids = _ids(args, options)
        self._place = self._place.to(ids.device)
        numbers = self._place[ids]
        if ids.device.type == "cpu":
            if bool((numbers < 0).any()):
                raise _strange_token(int(ids[numbers < 0][0]))
        elif ids.numel():  # asked at the end: to ask now is to wait for all that the device has still to do
            strange = torch.where(numbers < 0, ids, -1).max()
            known = strange if self._strange is None else self._strange.to(strange.device)
            self._strange, numbers = torch.maximum(known, strange), numbers.clamp(min=0)
        return (numbers, *args[1:]), {name: value for name, value in options.items() if name != "input"}

    def check(self) -> None:
        """Ask whether there was a token without a row, where nobody has asked yet."""
        if self._strange is not None and (token := int(self._strange)) >= 0:
            raise _strange_token(token)


def _strange_token(token: int) -> ModelError:
    return ModelError(
        f"found the token {token}, which is in none of the examples; expected none that the model adds itself but "
        "those that it adds to the sample"
    )
