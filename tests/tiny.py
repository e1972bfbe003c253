"""A model folder small enough to train in a second: random weights, a WordPiece vocabulary of a few words."""

from pathlib import Path

import torch
from transformers import BertConfig, BertForMaskedLM, BertTokenizer, PreTrainedModel

from guided_dropout.data.tasks import Examples, Task
from guided_dropout.models import quiet

WORDS = [
    *("the", "a", "cat", "dog", "bird", "tree", "house", "sees", "likes", "finds", "eats", "and", "or", "big", "small"),
    *("red", "green"),
]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
COLOUR = Task("colour", labels=("red", "green"), metrics=("accuracy", "f1"))


def tiny_bert_config(**changes: object) -> BertConfig:
    sizes = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 24,
    }
    return BertConfig(**{**sizes, **changes})


def save(model: PreTrainedModel, folder: Path, *, tokenizer: bool = True) -> Path:
    with quiet():
        model.save_pretrained(folder)
        if tokenizer:
            BertTokenizer(vocab={word: i for i, word in enumerate(VOCABULARY)}).save_pretrained(folder)
    return folder


def save_tiny_bert(folder: Path, **changes: object) -> Path:
    """A `BertForMaskedLM` with its tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return save(BertForMaskedLM(tiny_bert_config(**changes)), folder)


def colour_examples(number: int, seed: int) -> Examples:
    """Sentences that hold either "red" or "green", which is their label; learnable in a few steps."""
    generator = torch.Generator().manual_seed(seed)
    texts, labels = [], []
    for _ in range(number):
        length = int(torch.randint(3, 9, (), generator=generator))
        words = [WORDS[int(i)] for i in torch.randint(0, len(WORDS) - 2, (length,), generator=generator)]
        label = int(torch.randint(0, 2, (), generator=generator))
        words[int(torch.randint(0, length, (), generator=generator))] = COLOUR.labels[label]
        texts.append((" ".join(words),))
        labels.append(label)
    return Examples(texts, labels, "colours")
