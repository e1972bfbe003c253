"""Guided dropout with the transformers Trainer: each checkpoint holds the schedule, and a resumed run must have it."""

import tempfile

import torch
from transformers import Trainer, TrainingArguments

from guided_dropout import DropoutSchedule, GuidedDropoutCallback, estimate_fisher, load_lm

model = load_lm("demo")
ids = torch.randint(5, 100, (16, 12), generator=torch.Generator().manual_seed(0))
samples = [{"input_ids": row, "labels": row} for row in ids]
profile = estimate_fisher(model, samples, batch_size=8)
schedule = DropoutSchedule.from_profile(profile, model, upper=0.1, lower=0.0)

with tempfile.TemporaryDirectory() as folder:
    args = TrainingArguments(
        output_dir=folder, max_steps=2, save_steps=2, per_device_train_batch_size=8, report_to="none"
    )
    trainer = Trainer(model, args, train_dataset=samples)
    trainer.add_callback(GuidedDropoutCallback(schedule, trainer=trainer))
    trainer.train()
