"""Writes the loss of each step of a training to a file and prints lines of progress."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import Callback

from nemo_minitron.hosts.losses import Losses
from nemo_minitron.hosts.nemo.trainer import leave_context


class LossLog(Callback):
    """Writes the files that `hosts.losses.Losses` describes. Rank 0 writes.

    `path`: loss.csv; `every`: steps between two lines of progress. `parts`: a Distillation callback, whose parts become
    columns.
    """

    def __init__(self, path: str, tokens_per_step: int, every: int = 10, parts: Any = None) -> None:
        self.path, self.tokens, self.every, self.parts = path, tokens_per_step, every, parts
        self._losses: Losses | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        leave_context(trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero:
            names = self.parts.names if self.parts else []
            done = trainer.global_step
            self._losses = Losses(self.path, self.tokens, trainer.max_steps, done, names, self.every)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, index: int) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if self._losses is not None:
            self._losses.row(trainer.global_step, float(loss), self.parts.parts if self.parts else {})

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self._losses is not None:
            self._losses.held_out(trainer.global_step, float(trainer.callback_metrics["val_loss"]))
