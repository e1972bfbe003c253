"""Guided dropout with Lightning (2.2 or later), whose Trainer leaves the modes of a module's parts as they are.

Since 2.2 Lightning no longer calls `train()` on the whole module before fitting, and `from_pretrained` gives a model in
evaluation mode, where nothing drops: call `train()` first. The schedule goes on in `on_train_start`, not in
`on_fit_start`: Lightning's finders of learning rates and batch sizes train before the module's own `on_fit_start`.
"""

import lightning
import torch

from guided_dropout import DropoutHandle, DropoutSchedule, apply_dropout, estimate_fisher, load_lm


class Model(lightning.LightningModule):
    """A language model with a schedule that is on while it is fitted."""

    def __init__(self, model: torch.nn.Module, schedule: DropoutSchedule):
        super().__init__()
        self.model = model
        self.schedule = schedule
        self.handle: DropoutHandle | None = None

    def on_train_start(self) -> None:
        """Put the schedule on."""
        self.on_train_end()  # that of a fit which an error ended is still on
        self.model.train()
        self.handle = apply_dropout(self.model, self.schedule)

    def on_train_end(self) -> None:
        """Take it off."""
        if self.handle is not None:
            self.handle.remove()
            self.handle = None

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        """The loss of a batch of token ids."""
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.model.parameters(), lr=1e-4)


if __name__ == "__main__":
    language_model = load_lm("demo")
    ids = torch.randint(5, 100, (16, 12), generator=torch.Generator().manual_seed(0))
    profile = estimate_fisher(language_model, [{"input_ids": row, "labels": row} for row in ids], batch_size=8)
    rates = DropoutSchedule.from_profile(profile, language_model, upper=0.1, lower=0.0)
    loader = torch.utils.data.DataLoader(ids, batch_size=8)
    lightning.Trainer(max_steps=2, logger=False).fit(Model(language_model, rates), loader)
