"""What is measured: models, lengths, batches. Everything is drawn from seeds, so that anyone gets the same."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from guided_dropout.objectives import IGNORE, Objective

MASK_SHARE = 0.15
SEED = 0
Sample = dict[str, torch.Tensor]

# Which methods a case is measured with; each level has those of the levels before it.
CORE, MAIN, MORE, ALL = 1, 2, 3, 4


@dataclass(frozen=True)
class Case:
    """One model on one batch.

    Attributes:
        family: ``"bert"``, ``"gpt2"`` or ``"llama"``.
        layers: number of blocks.
        width: hidden size; heads and inner size follow from it.
        vocab: vocabulary size.
        tokens: length of the longest sample.
        padded: the samples' lengths are uniform between a quarter of `tokens` and all of it.
        batch: samples in the batch.
        check: how many of them are compared with the float64 oracle.
        level: which methods it is measured with by default.
        by_default: measured when no case is named.
    """

    family: str
    layers: int
    width: int
    vocab: int
    tokens: int
    padded: bool = False
    batch: int = 8
    check: int = 8
    level: int = CORE
    by_default: bool = True

    @property
    def name(self) -> str:
        """For instance ``bert-6x384-128-padded``."""
        return f"{self.family}-{self.layers}x{self.width}-{self.tokens}" + "-padded" * self.padded

    @property
    def objective(self) -> Objective:
        """Masked LM for BERT, next token otherwise."""
        return Objective("mlm" if self.family == "bert" else "causal")

    def model(self, folder: str | None = None, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The model in evaluation mode and without dropout: random weights, or those in `folder`."""
        if folder is not None and self.takes(folder):
            off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            model = AutoModelForMaskedLM.from_pretrained(folder, dtype=dtype, **off)
        else:
            torch.manual_seed(SEED)
            model = self._random().to(dtype)  # pyright: ignore[reportArgumentType]
        if hasattr(model.config, "use_cache"):
            model.config.use_cache = False
        return model.eval()

    def takes(self, folder: str) -> bool:
        """Whether the model in `folder` has this case's shape."""
        c = BertConfig.from_pretrained(folder)
        found = (c.model_type, c.num_hidden_layers, c.hidden_size, c.vocab_size)
        return found == (self.family, self.layers, self.width, self.vocab) and c.max_position_embeddings >= self.tokens

    def _random(self) -> PreTrainedModel:
        heads = max(2, self.width // 64 if self.width != 384 else 12)
        tokens: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": self.vocab}
        shared: dict[str, Any] = {
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": heads,
        }
        if self.family == "bert":
            off: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            return BertForMaskedLM(BertConfig(**tokens, **shared, intermediate_size=4 * self.width, **off))
        if self.family == "gpt2":
            off: dict[str, Any] = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
            return GPT2LMHeadModel(GPT2Config(**tokens, n_embd=self.width, n_layer=self.layers, n_head=heads, **off))
        inner = 8 * self.width // 3 // 64 * 64 or 2 * self.width
        return LlamaForCausalLM(LlamaConfig(**tokens, **shared, intermediate_size=inner))

    def samples(self) -> list[Sample]:
        """The batch: token numbers by Zipf's law; 15 % of a masked LM's positions are targets."""
        g = torch.Generator().manual_seed(SEED)
        special = min(1000, self.vocab // 4)  # the mask token is one of these
        zipf = 1 / (torch.arange(self.vocab - special) + 10.0)
        lengths = [self.tokens] * self.batch
        if self.padded:
            low = max(4, self.tokens // 4)
            drawn = torch.randint(low, self.tokens + 1, (self.batch - 1,), generator=g)
            lengths = [self.tokens, *drawn.tolist()]
        samples = []
        for n in lengths:
            ids = special + torch.multinomial(zipf, n, replacement=True, generator=g)
            labels = ids.clone()
            if self.objective.name == "mlm":
                target = torch.randperm(n, generator=g)[: max(1, round(MASK_SHARE * n))]
                labels = torch.full_like(ids, IGNORE).index_copy_(0, target, ids[target])
                ids[target] = special // 2
            samples.append({"input_ids": ids, "labels": labels})
        return samples

    def facts(self, folder: str | None = None) -> dict[str, Any]:
        """The case in a result file."""
        samples = self.samples()
        given = folder if folder is not None and self.takes(folder) else None
        return {
            "name": self.name,
            "family": self.family,
            "layers": self.layers,
            "width": self.width,
            "vocabulary": self.vocab,
            "batch": self.batch,
            "tokens": [len(s["input_ids"]) for s in samples],
            "targets": sum(int((self.objective.targets(s["labels"]) != IGNORE).sum()) for s in samples),
            "weights": given.rstrip("/").rsplit("/", 1)[-1] if given else f"random, seed {SEED}",
            "checked_samples": self.check,
        }


# (family, layers, width, tokens, padded) → level, for the cases that are measured by default.
_LEVELS = {
    ("bert", 6, 384, 128, False): ALL,
    ("bert", 6, 384, 128, True): MORE,
    ("bert", 6, 384, 512, False): MAIN,
    ("bert", 6, 384, 512, True): CORE,
    ("bert", 12, 768, 128, False): MAIN,
    ("bert", 12, 768, 128, True): CORE,
    ("bert", 12, 768, 512, False): CORE,
    ("gpt2", 6, 384, 128, False): MORE,
    ("gpt2", 6, 384, 512, True): CORE,
    ("gpt2", 12, 768, 128, False): CORE,
    ("llama", 6, 384, 128, True): CORE,
}
_VOCABULARIES = {"bert": 30522, "gpt2": 50257, "llama": 32000}


def _full() -> list[Case]:
    sizes = itertools.product(_VOCABULARIES, [(6, 384), (12, 768)], [128, 512], [False, True])
    cases = []
    for family, (layers, width), tokens, padded in sizes:
        level = _LEVELS.get((family, layers, width, tokens, padded))
        check = 2 if (width, tokens) == (768, 512) else 8
        drawn = {"check": check, "level": level or CORE, "by_default": level is not None}
        cases.append(Case(family, layers, width, _VOCABULARIES[family], tokens, padded, **drawn))
    return cases


def _quick() -> list[Case]:
    tiny: dict[str, Any] = {"layers": 2, "width": 32, "vocab": 200, "tokens": 16, "batch": 4, "check": 4}
    kinds = [("bert", False, ALL), ("bert", True, ALL), ("gpt2", True, ALL), ("llama", False, CORE)]
    return [Case(family, padded=padded, level=level, **tiny) for family, padded, level in kinds]


def find_cases(patterns: list[str] | None = None, *, quick: bool = False) -> list[Case]:
    """The cases whose names match one of the shell patterns; without patterns those measured by default."""
    cases = _quick() if quick else _full()
    if patterns is None:
        return [c for c in cases if c.by_default]
    return [c for c in cases if any(fnmatch(c.name, p) for p in patterns)]
