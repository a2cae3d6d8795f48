"""Epochs of NeMo's fine-tuning data, so that a training that was interrupted goes on with the rows that come next."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import Callback

from nemo_minitron.hosts.nemo.trainer import leave_context


class TwiceTheSamples(Callback):
    """NeMo's module has as many samples as the steps take: one epoch. Lightning counts the batches of a resumed epoch
    on from where it was, and would end it early, at rows that were seen."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        leave_context(trainer)
        trainer.datamodule.max_train_samples *= 2
