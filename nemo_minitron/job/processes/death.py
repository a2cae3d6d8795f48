"""What ended a rank, in words: a signal, most often that memory ran out."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable
from pathlib import Path

_FAILED = re.compile(r"^\s*rank\s*:\s*(\d+).*?^\s*exitcode\s*:\s*(-?\d+)", re.MULTILINE | re.DOTALL)
_OURS = (-signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)  # what torchrun ends the other ranks with


def killed(code: int, lines: Iterable[str], before: int, alone: bool = True) -> str:
    """The rank that a signal ended, by torchrun's table of failures or the exit code of one process; else nothing.

    `before`: `oom_kills()` as the stage began. `alone`: the exit code is rank 0's, not torchrun's.
    """
    found = [(int(rank), int(exit_code)) for rank, exit_code in _FAILED.findall("".join(lines))]  # the first one first
    signals = [(rank, number) for rank, number in found[:1] if number < 0 and number not in _OURS]
    # Nobody else kills: a rank that loses its peers aborts itself, after the one whose error it is.
    signals += [(rank, number) for rank, number in found if number == -signal.SIGKILL]
    if not signals and code < 0:
        return f"{'rank 0' if alone else 'torchrun'} was killed by {_name(-code)}{_reason(-code, before)}"
    if not signals:
        return ""
    rank, number = signals[0]
    return f"rank {rank} was killed by {_name(-number)}{_reason(-number, before)}"


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _reason(number: int, before: int) -> str:
    if number != signal.SIGKILL:
        return ""
    if oom_kills() > before:
        return ": it ran out of memory, and the system's out-of-memory killer ended it"
    return ", as the system does where memory ran out"


def oom_kills() -> int:
    """How many processes Linux has killed for lack of memory since it started; 0 where it does not say."""
    try:
        found = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0
