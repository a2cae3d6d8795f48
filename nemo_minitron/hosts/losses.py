"""The files in which a training's losses go, a row a step, and its lines of progress. Both hosts write them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from math import isfinite
from pathlib import Path

from nemo_minitron.artifacts.files import atomic_file
from nemo_minitron.artifacts.run_folder import TrainingFolder
from nemo_minitron.hosts.trackers import Trackers
from nemo_minitron.megatron.progress import Report, say

HEADER = "step,tokens,loss,seconds"
HELD_OUT = "step,tokens,loss"


class Losses:
    """Writes `loss.csv` (step, tokens, loss, seconds, then the parts of the loss), and `validation.csv` (step, tokens,
    loss) beside it. The trackers of `--log` get the same numbers. Only rank 0 has one.

    `path`: loss.csv; `steps`: of the whole training; `names`: the parts of the loss; `every`: steps between two lines
    of progress; `done`: the steps of the checkpoint from which the training goes on. The rows of steps that are done
    again are replaced, and the seconds continue from the last row that stays.
    """

    def __init__(
        self, path: str | Path, tokens_per_step: int, steps: int, done: int, names: Sequence[str] = (), every: int = 10
    ) -> None:
        self.path, self.tokens, self.steps, self.every = Path(path), tokens_per_step, steps, every
        self.validation = self.path.with_name(TrainingFolder.validation)
        self.names = list(names)
        self._start = time.perf_counter()
        self._report = Report("step", scale=tokens_per_step, done=done)
        header = ",".join([HEADER, *names])
        kept = _kept(self.path, header, done)
        self._seconds_before = float(kept[-1].split(",")[3]) if kept else 0.0
        held_out = _kept(self.validation, HELD_OUT, done)
        _write(self.path, [header, *kept])
        if held_out:
            _write(self.validation, [HELD_OUT, *held_out])
        self._track = Trackers(self.path)

    def row(self, step: int, loss: float, parts: dict[str, float]) -> None:
        """Writes the row of a step, counted from 1."""
        spent = time.perf_counter() - self._start
        row = f"{step},{step * self.tokens},{loss:.6f},{self._seconds_before + spent:.2f}"
        row = ",".join([row, *(f"{parts[name]:.6f}" for name in self.names)])
        with open(self.path, "a") as file:
            file.write(row + "\n")
        self._track(step, {"loss": loss, "tokens": step * self.tokens, **{name: parts[name] for name in self.names}})
        line = step % self.every == 0 or step == self.steps
        self._report(step, self.steps, f"loss {loss:.4f}", line=line)

    def held_out(self, step: int, loss: float) -> None:
        """Writes the row of a validation after a step."""
        if not self.validation.exists():
            _write(self.validation, [HELD_OUT])
        with open(self.validation, "a") as file:
            file.write(f"{step},{step * self.tokens},{loss:.6f}\n")
        self._track(step, {"held_out_loss": loss})
        say(f"step {step}/{self.steps}  held-out loss {loss:.4f}")

    def stale(self) -> int:
        """The validations since the one with the lowest loss."""
        losses = [float(row.split(",")[2]) for row in self.validation.read_text().splitlines()[1:]]
        return len(losses) - 1 - losses.index(min(losses))


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
