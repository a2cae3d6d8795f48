"""Says which signal ended a rank. Most often it is SIGKILL, because the machine ran out of memory."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable
from pathlib import Path

# Only the first failure counts in torchrun's table: it has ended the other ranks itself, or they have lost a peer.
_FIRST = re.compile(r"Root Cause.*?^\s*rank\s*:\s*(\d+).*?^\s*exitcode\s*:\s*(-?\d+)", re.MULTILINE | re.DOTALL)


def killed(code: int, lines: Iterable[str], before: int, alone: bool = True) -> str:
    """A sentence about the rank that a signal ended; empty if none did.

    `code`: the exit code of rank 0 if it is `alone`, otherwise torchrun's. `lines`: the stage's output, which ends with
    torchrun's table of failures. `before`: `oom_kills()` when the stage began.
    """
    failure = _FIRST.search("".join(lines))
    if failure and int(failure[2]) < 0:
        who, number = f"rank {failure[1]}", -int(failure[2])
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
    return ", as the system does when memory runs out"


def oom_kills() -> int:
    """The number of processes that Linux has killed for lack of memory since it started. 0 if it does not say."""
    try:
        count = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(count[1]) if count else 0
