"""Progress of a stage in a process of its own. The launcher shows it on the screen and writes it to the log."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from nemo_minitron.progress import SECONDS, Meter
from nemo_minitron.settings.progress import LIFELINE, PROGRESS, tell

if TYPE_CHECKING:
    from torch import nn

OFTEN = 0.5  # seconds, at least, between two movements of the launcher's bar


def say(line: str) -> None:
    """Prints a line of progress. Only rank 0 calls it."""
    sys.stdout.write(f"{PROGRESS}{line}\n")  # one write, because other ranks print at the same time
    sys.stdout.flush()


class Report:
    """Progress of work of which `done` steps were done before. Only rank 0 has one.

    `unit` and `scale`: what the rate counts, and how many of them one step is.
    """

    def __init__(self, what: str, unit: str = "tokens", scale: float = 1, done: int = 0) -> None:
        self._meter, self._told, self._said = Meter(what, unit, scale), 0.0, time.monotonic()
        self._meter.begin(done)

    def __call__(self, done: int, total: int = 0, note: str = "", line: bool | None = None) -> None:
        """Says that `done` of `total` steps are done. `line`: whether a log has a line of it; None: if the last one is
        ten seconds old."""
        now, work = time.monotonic(), self._meter.at(done, total, note)
        due = line if line is not None else now - self._said >= SECONDS
        self._said = now if due else self._said
        if LIFELINE not in os.environ:  # a user's own script
            if due:
                say(work.line()[2:])
        elif due or now - self._told >= OFTEN:
            self._told = now
            tell(rank=0, work=dataclasses.asdict(work), line=due)


def rows(what: str, samples: int, sequence_length: int, done: int) -> Report:
    """The Report of a pass of `samples` rows through a model, `done` of which an earlier run has done."""
    report = Report(f"{what}: row", scale=sequence_length, done=done)
    if done:
        say(f"{what}: {done} of {samples} rows were done before, goes on from there")
    report(done, samples)
    return report


@contextlib.contextmanager
def counted(chunk: nn.Module, passed: Callable[[int], None]) -> Iterator[None]:
    """In the block, calls `passed` with the number of forward passes of a chunk after each of them."""
    passes = [0]

    def count(*_: object) -> None:
        passes[0] += 1
        passed(passes[0])

    hook = chunk.register_forward_hook(count)
    try:
        yield
    finally:
        hook.remove()
