"""Lines of progress, which the launcher prints on the screen."""

from __future__ import annotations

import sys
import time

from nemo_minitron.settings.progress import PROGRESS

SECONDS = 10  # at least, between two lines


def say(line: str) -> None:
    """Prints a line of progress. Only rank 0 calls it."""
    sys.stdout.write(f"{PROGRESS}{line}\n")  # one write, because other ranks print at the same time
    sys.stdout.flush()


class Rows:
    """Progress of a calibration of `samples` rows, `done` of which an earlier run has done."""

    def __init__(self, samples: int, sequence_length: int, done: int) -> None:
        self.samples, self.length, self.done = samples, sequence_length, done
        self._start = self._said = time.perf_counter()
        if done:
            say(f"calibration: {done} of {samples} rows were done before, goes on from there")

    def to(self, row: int) -> None:
        """Says that `row` rows are done. Prints a line at most every ten seconds."""
        now = time.perf_counter()
        if now - self._said < SECONDS:
            return
        self._said, rate = now, (row - self.done) / (now - self._start)
        left = max(0, self.samples - row) / rate
        say(f"calibration: row {row}/{self.samples}  {rate * self.length:.0f} tokens/s  {left:.0f} s left")
