"""Lines of progress with a rate and the time left, for work in this process; workers have `megatron/progress.py`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

SECONDS = 10  # at least, between two lines


def to_stderr(line: str) -> None:
    """Prints a line of progress beside a result on stdout, which may be JSON."""
    print(line, file=sys.stderr, flush=True)


class Progress:
    """Says `> WHAT 12/32  1,240 tokens/s  5 s left`, at most every ten seconds.

    `unit` and `scale`: what the rate counts, and how many of them one step is. `say` prints a line.
    """

    def __init__(
        self, what: str, unit: str = "", scale: float = 1, say: Callable[[str], None] = to_stderr
    ) -> None:  # fmt: skip
        self.what, self.unit, self.scale, self.say = what, unit or "steps", scale, say
        self._start = self._said = time.monotonic()
        self._first = 0

    def begin(self, done: int) -> None:
        """The work starts now, and `done` steps were done before: the rate leaves them out."""
        self._start = self._said = time.monotonic()
        self._first = done

    def __call__(self, done: int, total: int) -> None:
        """Says that `done` of `total` steps are done, if the last line is old enough."""
        now = time.monotonic()
        if now - self._said < SECONDS or done <= self._first:
            return
        self._said, rate = now, (done - self._first) / max(now - self._start, 1e-9)
        left = max(0, total - done) / rate
        self.say(f"> {self.what} {done:,}/{total:,}  {rate * self.scale:,.0f} {self.unit}/s  {left:,.0f} s left")


class SoFar:
    """Says `> WHAT 1,234,567 tokens  120,000 tokens/s`, at most every ten seconds, of work whose end is not known."""

    def __init__(self, what: str, unit: str, say: Callable[[str], None] = to_stderr) -> None:
        self.what, self.unit, self.say = what, unit, say
        self._start = self._said = time.monotonic()

    def __call__(self, done: int) -> None:
        """Says that `done` are done, if the last line is old enough."""
        now = time.monotonic()
        if now - self._said < SECONDS:
            return
        self._said, rate = now, done / max(now - self._start, 1e-9)
        self.say(f"> {self.what} {done:,} {self.unit}  {rate:,.0f} {self.unit}/s")


def of_bytes(what: str, say: Callable[[str], None] = to_stderr) -> Progress:
    """Progress of a copy, whose steps are megabytes."""
    return Progress(what, "MB", say=say)
