"""Lines of progress, which the launcher passes on to the screen."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch.callbacks import Callback

from nemo_minitron.hosts.nemo.trainer import leave_context

SECONDS = 10


def say(line: str) -> None:
    sys.stdout.write(f"  > {line}\n")  # one write, newline and all: other ranks print too
    sys.stdout.flush()


class Rows:
    """Of `samples` rows `done` were there before; `to(row)` says how far it is, at most every ten seconds."""

    def __init__(self, samples: int, sequence_length: int, done: int) -> None:
        self.samples, self.length, self.done = samples, sequence_length, done
        self._start = self._said = time.perf_counter()
        if done:
            say(f"calibration: {done} of {samples} rows were done before, goes on from there")

    def to(self, row: int) -> None:
        now = time.perf_counter()
        if now - self._said < SECONDS:
            return
        self._said, rate = now, (row - self.done) / (now - self._start)
        left = max(0, self.samples - row) / rate
        say(f"calibration: row {row}/{self.samples}  {rate * self.length:.0f} tokens/s  {left:.0f} s left")


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
