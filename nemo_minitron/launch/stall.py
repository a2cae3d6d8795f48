"""Finds ranks that make no progress. A rank that is stopped, or waits for something that never comes, would hold all
others up for ever."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

from nemo_minitron.errors import InputError
from nemo_minitron.launch.output import Rank

VARIABLE = "MINITRON_STALL_TIMEOUT"
SECONDS = 600  # the timeout, if `--stall-timeout` does not say it
START = 60  # seconds that processes have at least until their first report
EVERY = 20  # reports of a rank within the timeout


def stall_timeout() -> float:
    """Seconds without progress of any rank after which a stage is ended; 0 is never. `--stall-timeout` sets it.

    Raises InputError if the variable is not a whole number.
    """
    text = os.environ.get(VARIABLE, str(SECONDS))
    if not text.isdecimal():
        raise InputError(f"{VARIABLE} is '{text}'; it must be a whole number of seconds, or 0 for no limit")
    return int(text)


def stalled(ranks: Mapping[int, Rank], begun: float, timeout: float) -> bool:
    """Whether no rank has made progress for `timeout` seconds. `begun`: when the stage began."""
    return bool(timeout) and _silent(ranks, begun) >= (timeout if ranks else max(timeout, START))


def _silent(ranks: Mapping[int, Rank], begun: float) -> float:
    """Seconds since the last progress of any rank."""
    return time.monotonic() - max([begun, *(rank.since for rank in ranks.values() if rank.mark is not None)])


def words_of(ranks: Mapping[int, Rank], begun: float) -> str:
    """A sentence about the rank that holds the others up: one that a signal has stopped, or else the one whose model
    has run the fewest layers."""
    silent = _silent(ranks, begun)
    if not ranks:
        return f"no rank has reported its progress for {silent:.0f} s"
    number = min(ranks, key=lambda number: (_state(ranks[number].pid) != "T", ranks[number].layers, number))
    rank = ranks[number]
    stopped = ", a signal has stopped it" if _state(rank.pid) == "T" else ""
    behind = "" if stopped or len({other.layers for other in ranks.values()}) > 1 else ", nor has any other rank"
    return f"rank {number} has made no progress for {silent:.0f} s (process {rank.pid}{stopped}){behind}"


def unheard(ranks: Mapping[int, Rank], parent: int) -> dict[int, Rank]:
    """The ranks that a launcher has started and that have not reported yet. `parent`: the launcher's process."""
    started = {}
    for file in Path("/proc").glob("[0-9]*/environ"):
        pid = int(file.parent.name)
        if _parent(pid) == parent:
            with contextlib.suppress(OSError, ValueError):
                words = dict(item.partition("=")[::2] for item in file.read_text(errors="replace").split("\0"))
                started[int(words.get("RANK", ""))] = Rank(pid)
    return {number: rank for number, rank in started.items() if number not in ranks}


def _state(pid: int) -> str:
    """Linux's letter for the state of a process. T is stopped. Empty for a process that has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def kill(ranks: Mapping[int, Rank], parent: int) -> None:
    """Kills the ranks. A stopped rank cannot end by itself. Only processes of this stage's launcher are killed: the
    number of one that has ended may belong to another process by now."""
    for rank in ranks.values():
        if rank.pid == parent or _parent(rank.pid) == parent:
            with contextlib.suppress(OSError):
                os.kill(rank.pid, signal.SIGKILL)


def ask_for_stacks(ranks: Mapping[int, Rank], parent: int) -> None:
    """Makes each rank write the stacks of all its threads to the log, and waits a second for them."""
    for rank in ranks.values():
        if rank.pid == parent or _parent(rank.pid) == parent:
            with contextlib.suppress(OSError):
                os.kill(rank.pid, signal.SIGUSR1)
    time.sleep(1)


def _parent(pid: int) -> int:
    """The process that started this one; 0 if it has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return 0
