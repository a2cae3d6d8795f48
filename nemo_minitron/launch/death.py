"""What ended a rank, in words: a signal, most often that memory ran out."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable
from pathlib import Path

# The others in torchrun's table of failures are those that it has ended itself, or that have lost their peers.
_FIRST = re.compile(r"Root Cause.*?^\s*rank\s*:\s*(\d+).*?^\s*exitcode\s*:\s*(-?\d+)", re.MULTILINE | re.DOTALL)


def killed(code: int, lines: Iterable[str], before: int, alone: bool = True) -> str:
    """The rank that a signal ended, by torchrun's table of failures or the exit code of one process; else nothing.

    `before`: `oom_kills()` as the stage began. `alone`: the exit code is rank 0's, not torchrun's.
    """
    found = _FIRST.search("".join(lines))
    if found and int(found[2]) < 0:
        who, number = f"rank {found[1]}", -int(found[2])
    elif code < 0:
        who, number = "rank 0" if alone else "torchrun", -code
    else:
        return ""
    return f"{who} was killed by {_name(number)}{_reason(number, before)}"


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
