"""Guided dropout in a loop by hand: measure, make a schedule, train with it on."""

import torch

from guided_dropout import DropoutSchedule, apply_dropout, estimate_fisher, load_lm

model = load_lm("demo")
ids = torch.randint(5, 100, (16, 12), generator=torch.Generator().manual_seed(0))
samples = [{"input_ids": row, "labels": row} for row in ids]

profile = estimate_fisher(model, samples, batch_size=8)
schedule = DropoutSchedule.from_profile(profile, model, upper=0.1, lower=0.0)

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
model.train()
with apply_dropout(model, schedule):
    for batch in ids.split(8):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"loss {loss.item():.3f}")
