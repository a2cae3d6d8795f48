"""How far a piece of work is: a bar on a terminal, else a line every ten seconds, with a rate and the time left.

The rows of a calibration and the steps of a training are done in processes of their own. They send `Work` to their
launcher (`megatron/progress.py`), which shows it here.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
import time
from collections.abc import Callable

from nemo_minitron.errors import visible

SECONDS = 10  # at least, between two lines
Say = Callable[[str], None]


def to_stderr(line: str) -> None:
    """Prints a line of progress beside a result on stdout, which may be JSON."""
    print(line, file=sys.stderr, flush=True)


def _nowhere(line: str) -> None: ...


@dataclasses.dataclass(frozen=True)
class Work:
    """`done` of `total` steps of `what` are done; `total` is 0 if the end is not known. `rate`: `unit` a second, 0 if
    nothing is known yet. `left`: seconds. `note`: another number of the step, for example its loss."""

    what: str
    done: int
    total: int
    rate: float
    unit: str
    left: float
    note: str = ""

    @property
    def count(self) -> str:
        if self.total:
            return f"{self.done:,}/{self.total:,}"
        return f"{self.done:,} {self.unit}" if self.done else ""

    @property
    def pace(self) -> str:
        """Note, rate and time left, as far as they are known."""
        rate = f"{self.rate:,.0f}" if self.rate >= 10 else f"{self.rate:.2g}"
        parts = [self.note, *([f"{rate} {self.unit}/s"] if self.rate else [])]
        return "  ".join(filter(None, [*parts, _time(self.left) if self.rate and self.total else ""]))

    def line(self) -> str:
        """`> WHAT 12/32  1,240 tokens/s  5 s left`."""
        return "  ".join(filter(None, [f"> {self.what} {self.count}".rstrip(), self.pace]))


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s left"
    return f"{seconds / 60:.0f} min left" if seconds < 7200 else f"{seconds / 3600:.1f} h left"


class Meter:
    """Measures the rate of `what`. `scale`: how many of `unit` one step is."""

    def __init__(self, what: str, unit: str = "steps", scale: float = 1) -> None:
        self.what, self.unit, self.scale = what, unit, scale
        self.begin(0)

    def begin(self, done: int) -> None:
        """The work starts now, and `done` steps were done before: the rate leaves them out."""
        self._start, self.first = time.monotonic(), done

    def at(self, done: int, total: int = 0, note: str = "") -> Work:
        """The Work at this moment."""
        rate = max(0, done - self.first) / max(time.monotonic() - self._start, 1e-9)
        left = max(0, total - done) / rate if rate else 0
        return Work(self.what, done, total, rate * self.scale, self.unit, left, note)


class Bar:
    """A bar at the lower end of the terminal; what is printed meanwhile stands above it. There is none in a log.

    Two threads may use it: one shows, another closes.
    """

    def __init__(self) -> None:
        self._lock, self._closed, self._what = threading.Lock(), not on_terminal(), ""

    def show(self, work: Work) -> bool:
        """Draws the bar. False if there is no terminal."""
        with self._lock:
            if self._closed:
                return False
            if work.what != self._what:
                self._begin(work.what)
            count, pace, total = work.count, visible(work.pace), work.total or None
            self._rich.update(self._task, completed=work.done, total=total, count=count, pace=pace)
            return True

    def _begin(self, what: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._stop()
        words = [TextColumn("{task." + name + "}", markup=False) for name in ("fields[count]", "fields[pace]")]
        columns = (TextColumn("> {task.description}", markup=False), BarColumn(bar_width=24), *words)
        self._rich = Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=4)
        self._what, self._task = what, self._rich.add_task(visible(what), total=None, count="", pace="")
        self._rich.start()

    def _stop(self) -> None:
        if self._what:
            self._rich.stop()
        self._what = ""

    def close(self) -> None:
        """Takes the bar away, for good."""
        with self._lock:
            self._stop()
            self._closed = True


def on_terminal() -> bool:
    """Whether a bar can be drawn: both streams are a terminal that moves its cursor. Else a bar would stand in a file,
    or in the middle of another program's output."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if stream is not None and not stream.closed]
    return len(streams) == 2 and all(s.isatty() for s in streams) and os.environ.get("TERM", "dumb") != "dumb"


class Progress:
    """Shows the progress of work in this process, in a `with` block.

    `unit` and `scale`: what the rate counts, and how many of them one step is. `say` prints a line where there is no
    terminal. `note` takes the line where a bar is drawn, for a log.
    """

    def __init__(
        self, what: str, unit: str = "steps", scale: float = 1, say: Say = to_stderr, note: Say = _nowhere
    ) -> None:
        self.say, self.note, self._meter, self._bar = say, note, Meter(what, unit, scale), Bar()
        self._said = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def begin(self, done: int) -> None:
        """As `Meter.begin`."""
        self._meter.begin(done)
        self._said = time.monotonic()

    def __call__(self, done: int, total: int = 0) -> None:
        """Says that `done` of `total` steps are done: at once on a terminal, else if the last line is old enough."""
        work = self._meter.at(done, total)
        write = self.note if self._bar.show(work) else self.say
        if done > self._meter.first and time.monotonic() - self._said >= SECONDS:
            self._said = time.monotonic()
            write(work.line())
