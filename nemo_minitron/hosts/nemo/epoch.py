"""Gives NeMo's fine-tuning data twice the samples, so that an interrupted training resumes with the right rows."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import Callback

from nemo_minitron.hosts.nemo.trainer import leave_context


class TwiceTheSamples(Callback):
    """NeMo's module has as many samples as the steps need, which is one epoch. When a training resumes, Lightning
    continues the old count of the epoch's batches; the count would end the epoch too early, and the next epoch would
    repeat rows. With twice the samples the epoch does not end before the training."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        leave_context(trainer)
        trainer.datamodule.max_train_samples *= 2
