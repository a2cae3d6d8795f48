"""Prints the progress of a calibration that runs as a validation."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import Callback

from nemo_minitron.hosts.nemo.trainer import leave_context
from nemo_minitron.megatron.progress import Report, rows


class Progress(Callback):
    """Rank 0 prints lines of progress during `trainer.validate`. `done`: rows of an earlier run; `rows_per_step`: rows
    of a global batch."""

    def __init__(self, samples: int, sequence_length: int, done: int, rows_per_step: int) -> None:
        self.settings, self.done, self.rows_per_step = (samples, sequence_length, done), done, rows_per_step
        self._report: Report | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        leave_context(trainer)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero:
            self._report = rows("calibration", *self.settings)

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, index: int, *_: Any
    ) -> None:
        if self._report is not None:
            samples = self.settings[0]
            self._report(min(samples, self.done + (index + 1) * self.rows_per_step), samples)
