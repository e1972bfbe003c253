"""Pretrain the embedded demo masked LM from a text file. Seeded; killed and rerun, it goes on from its last checkpoint.

    python tools/pretrain_demo_lm.py wikipedia.txt.xz --out build/demo-lm

The text has one paragraph a line and an empty line between articles. The last 1 % of its characters is held out:
neither the tokenizer nor the model sees it, and the model card's figures are measured there. The result (safetensors in
float16, config, tokenizer, README.md) is what `src/guided_dropout/demo/model` holds.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import platform
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PAD, UNK, CLS, SEP, MASK = range(5)
IGNORE = -100


def read_paragraphs(path: Path) -> tuple[list[str], list[str]]:
    """(training, held-out) paragraphs of at least 60 characters; the split is at 99 % of the characters."""
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as f:
        lines = [s for s in (line.strip() for line in f) if len(s) >= 60]
    total, seen, cut = sum(map(len, lines)), 0, 0
    while seen < 0.99 * total:
        seen += len(lines[cut])
        cut += 1
    return lines[:cut], lines[cut:]


def train_tokenizer(paragraphs: list[str], vocab_size: int) -> Tokenizer:
    """Uncased WordPiece, as BERT's."""
    tok = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tok.normalizer = normalizers.BertNormalizer(lowercase=True)
    tok.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=SPECIAL, limit_alphabet=200)
    tok.train_from_iterator(paragraphs, trainer)
    tok.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    return tok


def encode(tok: Tokenizer, paragraphs: list[str], path: Path) -> torch.Tensor:
    """One stream of int16 token ids, paragraphs joined by [SEP]; cached at `path`."""
    if path.exists():
        return torch.load(path, weights_only=True)
    ids: list[torch.Tensor] = []
    for i in range(0, len(paragraphs), 2000):
        for e in tok.encode_batch(paragraphs[i : i + 2000], add_special_tokens=False):
            ids.append(torch.tensor([*e.ids, SEP], dtype=torch.int16))
    stream = torch.cat(ids)
    torch.save(stream, path)
    return stream


def mask_tokens(ids: torch.Tensor, vocab_size: int, gen: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """15 % of the ordinary tokens become targets: 80 % [MASK], 10 % a random token, 10 % as they were."""
    u, v = torch.rand(2, *ids.shape, generator=gen)
    target = (u < 0.15) & (ids >= len(SPECIAL))
    labels = ids.masked_fill(~target, IGNORE)
    noise = torch.randint(len(SPECIAL), vocab_size, ids.shape, generator=gen)
    inputs = torch.where(target & (v < 0.8), MASK, torch.where(target & (v >= 0.9), noise, ids))
    return inputs, labels


class Blocks:
    """Blocks of `length` tokens, [CLS] + stream + [SEP], in an order fixed by (seed, epoch)."""

    def __init__(self, stream: torch.Tensor, length: int, seed: int):
        body = length - 2
        self.rows = stream[: len(stream) // body * body].view(-1, body)
        self.seed = seed

    def batch(self, step: int, size: int) -> torch.Tensor:
        """Token ids [size, length] of step number `step`."""
        per_epoch = len(self.rows) // size
        epoch, k = divmod(step, per_epoch)
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(self.seed + epoch))
        rows = self.rows[order[k * size : (k + 1) * size]].long()
        return F.pad(F.pad(rows, (1, 0), value=CLS), (0, 1), value=SEP)


def masked_loss(model: BertForMaskedLM, ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean cross-entropy, top-1 accuracy) over the targets; the head runs at target positions only."""
    hidden = model.bert(input_ids=ids).last_hidden_state
    at = labels != IGNORE
    logits = model.cls(hidden[at])
    return F.cross_entropy(logits, labels[at]), (logits.argmax(-1) == labels[at]).float().mean()


@torch.no_grad()
def evaluate(model: BertForMaskedLM, blocks: Blocks, unigram: torch.Tensor) -> dict[str, float]:
    """Held-out loss (nats) and accuracy of the model and of the training text's unigram distribution, same targets."""
    model.eval()
    sums = dict.fromkeys(("loss", "accuracy", "unigram_loss", "unigram_accuracy"), 0.0)
    n = 0
    logp = ((unigram + 1) / (unigram + 1).sum()).log()
    for i in range(min(40, len(blocks.rows) // 64)):
        rows = blocks.rows[i * 64 : (i + 1) * 64].long()
        ids = F.pad(F.pad(rows, (1, 0), value=CLS), (0, 1), value=SEP)
        x, y = mask_tokens(ids, len(unigram), torch.Generator().manual_seed(10_000 + i))
        loss, acc = masked_loss(model, x, y)
        t = y[y != IGNORE]
        k = len(t)
        n += k
        sums["loss"] += loss.item() * k
        sums["accuracy"] += acc.item() * k
        sums["unigram_loss"] += -logp[t].sum().item()
        sums["unigram_accuracy"] += (t == logp.argmax()).sum().item()
    model.train()
    return {**{k: v / n for k, v in sums.items()}, "targets": n}


CARD = """# demo-bert

An uncased BERT masked LM ({layers} layers x {hidden}, {heads} heads, vocabulary {vocab:,}, {params:.2f} M parameters,
stored as float16) that this project pretrained itself, so that the quickstart needs no model hub. It is a toy: use it
to see the tool work, not to draw conclusions about language models.

Text: English Wikipedia articles ({train_tokens:.1f} M training tokens; the last 1 % of the text held out).
Recipe: `tools/pretrain_demo_lm.py`, {steps:,} steps, {tokens_seen:.1f} M tokens seen, seed {seed}, no dropout,
AdamW, peak learning rate {lr}, {precision}; torch {torch}, transformers {transformers}, {date}.

| held-out masked LM | loss (nats) | top-1 | unigram loss | unigram top-1 | targets |
|---|---|---|---|---|---|
{rows}

The unigram columns are the training text's token frequencies on the same targets. Most of the training was on 64
tokens: positions beyond the 64th saw only the last {long_steps:,} steps, and it shows.

The weights are under the project's licence. The Wikipedia text they were trained on is CC BY-SA 4.0 and is not
included.
"""


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("text", type=Path)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--steps", type=int, default=11000)
    p.add_argument(
        "--long-steps", type=int, default=1000, help="of the steps, how many at the end use 128-token blocks"
    )
    p.add_argument("--batch-tokens", type=int, default=4096)
    p.add_argument("--lr", type=float, default=1.5e-3)
    p.add_argument("--vocab-size", type=int, default=8192)
    p.add_argument("--hidden", type=int, default=128)
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="autocast the training forward")
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)

    tok_file = a.out / "wordpiece.json"
    caches = [a.out / "train.ids.pt", a.out / "held.ids.pt"]
    train_text, held_text = ([], []) if all(c.exists() for c in caches) else read_paragraphs(a.text)
    if not tok_file.exists():
        train_tokenizer(train_text[:: max(1, len(train_text) // 60_000)], a.vocab_size).save(str(tok_file))
    tok = Tokenizer.from_file(str(tok_file))
    stream, held = encode(tok, train_text, caches[0]), encode(tok, held_text, caches[1])
    print(f"{len(stream):,} training tokens, {len(held):,} held out", flush=True)
    vocab = tok.get_vocab_size()

    torch.manual_seed(a.seed)
    config = BertConfig(
        vocab_size=vocab, hidden_size=a.hidden, num_hidden_layers=a.layers, num_attention_heads=a.hidden // 32,
        intermediate_size=4 * a.hidden, max_position_embeddings=128, pad_token_id=PAD,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForMaskedLM(config)
    unigram = torch.bincount(stream.long(), minlength=vocab).float()
    with torch.no_grad():  # the head starts at the unigram distribution instead of learning it
        model.cls.predictions.bias.copy_(((unigram + 1) / (unigram + 1).sum()).log())
    decay = [q for q in model.parameters() if q.dim() > 1]
    plain = [q for q in model.parameters() if q.dim() == 1]
    opt = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}],
        lr=a.lr, betas=(0.9, 0.98), eps=1e-6,
    )  # fmt: skip
    warm = max(1, a.steps // 20)
    sched = torch.optim.lr_scheduler.LambdaLR(
        opt, lambda s: min((s + 1) / warm, 0.02 + 0.98 * max(0.0, (a.steps - s) / (a.steps - warm)))
    )

    start, history = 0, []
    checkpoint = a.out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["opt"])
        sched.load_state_dict(state["sched"])
        start, history = state["step"], state["history"]
        print(f"resumed at step {start}", flush=True)
    short, long = Blocks(stream, 64, a.seed), Blocks(stream, 128, a.seed)
    held_blocks = {64: Blocks(held, 64, 0), 128: Blocks(held, 128, 0)}

    model.train()
    clock, tokens = time.perf_counter(), 0
    for step in range(start, a.steps):
        is_long = step >= a.steps - a.long_steps
        blocks, length = (long, 128) if is_long else (short, 64)
        ids = blocks.batch(step, a.batch_tokens // length)
        x, y = mask_tokens(ids, vocab, torch.Generator().manual_seed(a.seed * 1_000_003 + step))
        with torch.autocast("cpu", torch.bfloat16, enabled=a.bf16):
            loss, _ = masked_loss(model, x, y)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        sched.step()
        tokens += ids.numel()
        if (step + 1) % 250 == 0 or step + 1 == a.steps:
            figures = evaluate(model, held_blocks[length], unigram)
            rate = tokens / (time.perf_counter() - clock)
            print(
                f"step {step + 1:6d}  train {loss.item():.3f}  held-out {figures['loss']:.3f} "
                f"top-1 {figures['accuracy']:.3f}  (unigram {figures['unigram_loss']:.3f} "
                f"{figures['unigram_accuracy']:.3f})  {rate:,.0f} tokens/s",
                flush=True,
            )
            history.append({"step": step + 1, **figures})
            clock, tokens = time.perf_counter(), 0
            tmp = checkpoint.with_suffix(".tmp")
            torch.save(
                {"model": model.state_dict(), "opt": opt.state_dict(), "sched": sched.state_dict(),
                 "step": step + 1, "history": history}, tmp,
            )  # fmt: skip
            os.replace(tmp, checkpoint)

    final = {length: evaluate(model, blocks, unigram) for length, blocks in held_blocks.items()}
    folder = a.out / "model"
    # The dropout that fine-tuning will start from is BERT's default; pretraining used none.
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.1
    model.half().save_pretrained(folder)
    # Stored in float16 to be small, loaded in float32 to be exact.
    cfg = json.loads((folder / "config.json").read_text())
    cfg["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(cfg, indent=2, sort_keys=True) + "\n")
    (folder / "generation_config.json").unlink(missing_ok=True)
    PreTrainedTokenizerFast(
        tokenizer_object=tok, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=128,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip
    rows = "\n".join(
        f"| {n} tokens | {f['loss']:.3f} | {f['accuracy']:.1%} | {f['unigram_loss']:.3f} | {f['unigram_accuracy']:.1%} "
        f"| {f['targets']:,} |"
        for n, f in final.items()
    )
    facts: dict[str, Any] = dict(  # noqa: C408
        layers=a.layers, hidden=a.hidden, heads=a.hidden // 32, vocab=vocab, steps=a.steps, seed=a.seed, lr=a.lr,
        params=sum(q.numel() for q in model.parameters()) / 1e6, train_tokens=len(stream) / 1e6,
        tokens_seen=a.steps * a.batch_tokens / 1e6, torch=torch.__version__,
        transformers=transformers.__version__, date=date.today().isoformat(), rows=rows,
        long_steps=a.long_steps,
        precision="bfloat16 autocast" if a.bf16 else "float32", held_out=final,
    )  # fmt: skip
    (folder / "README.md").write_text(CARD.format(**facts))
    record = {**facts, "python": platform.python_version(), "history": history}
    (a.out / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    print((folder / "README.md").read_text())


if __name__ == "__main__":
    main()
