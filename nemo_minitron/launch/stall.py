"""Ranks that make no progress: one that is stopped, or waits for what never comes, holds all others for ever."""

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
SECONDS = 600
START = 60  # seconds that processes have to say the first thing
EVERY = 20  # times that a rank says within the timeout how far it is


def stall_timeout() -> float:
    """Seconds without progress of any rank after which a stage is ended; 0: never. `--stall-timeout` sets it.

    Raises InputError for what is no such number.
    """
    text = os.environ.get(VARIABLE, str(SECONDS))
    if not text.isdecimal():
        raise InputError(f"{VARIABLE} is '{text}'; it must be a whole number of seconds, or 0 for no limit")
    return int(text)


def stalled(ranks: Mapping[int, Rank], begun: float, timeout: float) -> bool:
    """Whether none has made progress for so long."""
    return bool(timeout) and _silent(ranks, begun) >= (timeout if ranks else max(timeout, START))


def _silent(ranks: Mapping[int, Rank], begun: float) -> float:
    """Seconds since the last progress of any rank."""
    return time.monotonic() - max([begun, *(rank.since for rank in ranks.values() if rank.mark is not None)])


def words_of(ranks: Mapping[int, Rank], begun: float) -> str:
    """Which rank holds the others: one that a signal has stopped, else the one whose model has gone through the
    fewest layers."""
    silent = _silent(ranks, begun)
    if not ranks:
        return f"no rank has said how far it is for {silent:.0f} s"
    number = min(ranks, key=lambda number: (_state(ranks[number].pid) != "T", ranks[number].layers, number))
    rank = ranks[number]
    stopped = ", a signal has stopped it" if _state(rank.pid) == "T" else ""
    behind = "" if stopped or len({other.layers for other in ranks.values()}) > 1 else ", nor has any other rank"
    return f"rank {number} has made no progress for {silent:.0f} s (process {rank.pid}{stopped}){behind}"


def unheard(ranks: Mapping[int, Rank], parent: int) -> dict[int, Rank]:
    """Ranks that a launcher has started and that have not yet said anything; they may never."""
    found = {}
    for file in Path("/proc").glob("[0-9]*/environ"):
        pid = int(file.parent.name)
        if _parent(pid) == parent:
            with contextlib.suppress(OSError, ValueError):
                words = dict(item.partition("=")[::2] for item in file.read_text(errors="replace").split("\0"))
                found[int(words.get("RANK", ""))] = Rank(pid)
    return {number: rank for number, rank in found.items() if number not in ranks}


def _state(pid: int) -> str:
    """Linux's letter for what a process does: T is stopped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def kill(ranks: Mapping[int, Rank], parent: int) -> None:
    """Ends ranks that do not leave by themselves, the stopped ones; those of this stage's launcher alone."""
    for rank in ranks.values():
        if rank.pid == parent or _parent(rank.pid) == parent:
            with contextlib.suppress(OSError):
                os.kill(rank.pid, signal.SIGKILL)


def ask_for_stacks(ranks: Mapping[int, Rank], parent: int) -> None:
    """Each rank that runs writes where all its threads are into the log."""
    for rank in ranks.values():
        if rank.pid == parent or _parent(rank.pid) == parent:
            with contextlib.suppress(OSError):
                os.kill(rank.pid, signal.SIGUSR1)
    time.sleep(1)


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return 0
