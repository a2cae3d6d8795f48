"""Writes the loss of each step of a training to a file and prints lines of progress."""

from __future__ import annotations

import time
from math import isfinite
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

from nemo_minitron.artifacts.files import atomic_file
from nemo_minitron.artifacts.run_folder import TrainingFolder
from nemo_minitron.hosts.nemo.trainer import leave_context
from nemo_minitron.megatron.progress import say


class LossLog(Callback):
    """Writes `loss.csv` (step, tokens, loss, seconds, then the parts of the loss), and `validation.csv` (step, tokens,
    loss) beside it for validations during the fit. Rank 0 writes.

    `every`: steps between two lines of progress. `parts`: a Distillation callback, whose parts become columns. After a
    resume the rows of steps that are done again are replaced, and the seconds continue from the last row that stays.
    """

    HEADER = "step,tokens,loss,seconds"

    def __init__(self, path: str, tokens_per_step: int, every: int = 10, parts: Any = None) -> None:
        self.path, self.tokens, self.every, self.parts = Path(path), tokens_per_step, every, parts
        self.validation = self.path.with_name(TrainingFolder.validation)
        self._seconds_before = self._start = 0.0
        self._first = 0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        leave_context(trainer)

    @property
    def _names(self) -> list[str]:
        return self.parts.names if self.parts else []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._start, self._first = time.perf_counter(), trainer.global_step
        header = ",".join([self.HEADER, *self._names])
        kept = _kept(self.path, header, trainer.global_step)
        self._seconds_before = float(kept[-1].split(",")[3]) if kept else 0.0
        held_out = _kept(self.validation, "step,tokens,loss", trainer.global_step)
        if trainer.is_global_zero:
            _write(self.path, [header, *kept])
            if held_out:
                _write(self.validation, ["step,tokens,loss", *held_out])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, index: int) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if not trainer.is_global_zero:
            return
        step, spent = trainer.global_step, time.perf_counter() - self._start
        row = f"{step},{step * self.tokens},{float(loss):.6f},{self._seconds_before + spent:.2f}"
        row = ",".join([row, *(f"{self.parts.parts[name]:.6f}" for name in self._names)])
        with open(self.path, "a") as file:
            file.write(row + "\n")
        if step % self.every == 0 or step == trainer.max_steps:
            rate = (step - self._first) * self.tokens / spent
            left = (trainer.max_steps - step) * self.tokens / rate
            say(f"step {step}/{trainer.max_steps}  loss {float(loss):.4f}  {rate:.0f} tokens/s  {left:.0f} s left")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or not trainer.is_global_zero:
            return
        step, loss = trainer.global_step, float(trainer.callback_metrics["val_loss"])
        if not self.validation.exists():
            _write(self.validation, ["step,tokens,loss"])
        with open(self.validation, "a") as file:
            file.write(f"{step},{step * self.tokens},{loss:.6f}\n")
        say(f"step {step}/{trainer.max_steps}  held-out loss {loss:.4f}")


def _kept(path: Path, header: str, step: int) -> list[str]:
    """The complete rows that an earlier part of this training has written, up to a step. There are none if the file has
    other columns."""
    rows = path.read_text(errors="replace").splitlines() if path.exists() else []
    if rows[:1] != [header]:
        return []
    return [row for row in rows[1:] if _is_complete(row, header) and float(row.split(",")[0]) <= step]


def _is_complete(row: str, header: str) -> bool:
    """Whether a row has all columns. A kill may leave a part of a row."""
    cells = row.split(",")
    try:
        seconds = [float(cell) for cell in cells[3:4]]
    except ValueError:
        return False
    return len(cells) == header.count(",") + 1 and cells[0].isdecimal() and all(map(isfinite, seconds))


def _write(path: Path, rows: list[str]) -> None:
    with atomic_file(path) as file:
        file.write_text("\n".join(rows) + "\n")
