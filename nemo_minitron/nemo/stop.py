"""Stopping a training before its last step, to go on later: the schedule and the data stay those of all steps."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import Callback

from nemo_minitron.nemo.trainer import leave_context


class StopAfter(Callback):
    """Ends `trainer.fit` after step `step`, which the checkpoint callback has saved if it is one of its own."""

    def __init__(self, step: int) -> None:
        self.step = step

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        leave_context(trainer)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step >= self.step
