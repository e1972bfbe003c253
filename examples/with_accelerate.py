"""Guided dropout with accelerate: the schedule goes on before `prepare`, which may wrap the model."""

import torch
from accelerate import Accelerator

from guided_dropout import DropoutSchedule, apply_dropout, estimate_fisher, load_lm

accelerator = Accelerator()
model = load_lm("demo")
ids = torch.randint(5, 100, (16, 12), generator=torch.Generator().manual_seed(0))
profile = estimate_fisher(model, [{"input_ids": row, "labels": row} for row in ids], batch_size=8)

with apply_dropout(model, DropoutSchedule.from_profile(profile, model, upper=0.1, lower=0.0)):
    loader = torch.utils.data.DataLoader(ids, batch_size=8)
    prepared, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-4), loader)
    prepared.train()
    for batch in loader:
        loss = prepared(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.print(f"loss {loss.item():.3f}")
