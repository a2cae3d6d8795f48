"""How far a validation is, said by rank 0."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import Callback

from nemo_minitron.hosts.nemo.trainer import leave_context
from nemo_minitron.megatron.progress import Rows


class Progress(Callback):
    """On `trainer.validate`, whose batches have `whole` rows: rank 0 says how far it is."""

    def __init__(self, samples: int, sequence_length: int, done: int, whole: int) -> None:
        self.settings, self.done, self.whole = (samples, sequence_length, done), done, whole
        self._rows: Rows | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        leave_context(trainer)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero:
            self._rows = Rows(*self.settings)

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, index: int, *_: Any
    ) -> None:
        if self._rows is not None:
            self._rows.to(self.done + (index + 1) * self.whole)
