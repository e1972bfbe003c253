"""The recipe of transformers' ``run_glue.py`` with dynamic padding, for files at hand: what most people would run.

The original needs the hub for data and metrics. Here the data are two CSV files (``sentence1[,sentence2],label``) read
by `datasets`, as the original does with ``--train_file``; the metric is scikit-learn's. As there: tokens are made by
``Dataset.map``, batches are drawn at random and padded to their longest example, the Trainer is as it comes, and there
is one evaluation at the end. Nothing is saved.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from datasets import load_dataset
from sklearn.metrics import accuracy_score, matthews_corrcoef
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    set_seed,
)


def main() -> None:
    """Train, evaluate, write the metrics as JSON."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--model", required=True)
    p.add_argument("--train", required=True)
    p.add_argument("--validation", required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--epochs", type=int, default=3)
    p.add_argument("--batch-size", type=int, default=16)
    p.add_argument("--learning-rate", type=float, default=2e-5)
    p.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    args = p.parse_args()

    set_seed(args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        files = {"train": args.train, "validation": args.validation}
        raw = load_dataset("csv", data_files=files, cache_dir=scratch)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2)
        keys = [k for k in ("sentence1", "sentence2") if k in raw["train"].column_names]
        data = raw.map(lambda rows: tokenizer(*(rows[k] for k in keys), max_length=128, truncation=True), batched=True)

        def compute_metrics(found: EvalPrediction) -> dict[str, float]:
            predictions = np.argmax(found.predictions, axis=1)
            return {
                "accuracy": float(accuracy_score(found.label_ids, predictions)),
                "matthews_correlation": float(matthews_corrcoef(found.label_ids, predictions)),
            }

        steps = args.epochs * -(-len(data["train"]) // args.batch_size)
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=scratch,
                num_train_epochs=args.epochs,
                per_device_train_batch_size=args.batch_size,
                learning_rate=args.learning_rate,
                warmup_steps=round(0.1 * steps),
                bf16=args.precision == "bfloat16",
                seed=args.seed,
                save_strategy="no",
                report_to="none",
            ),
            train_dataset=data["train"],
            eval_dataset=data["validation"],
            compute_metrics=compute_metrics,
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
        )
        trainer.train()
        metrics = trainer.evaluate()
    found = {k.removeprefix("eval_"): v for k, v in metrics.items()}
    args.out.write_text(
        json.dumps({**found, "device": str(trainer.args.device), "devices": max(1, trainer.args.n_gpu)})
    )


if __name__ == "__main__":
    main()
