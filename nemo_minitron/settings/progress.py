"""What a worker and its launcher agree upon: how a worker's lines begin, and the variable that says who started it."""

from __future__ import annotations

import contextlib
import json
import os

PROGRESS = "  > "  # begins a line that the launcher prints on the screen
MARK = "  ~minitron "  # begins a worker's line for its launcher; JSON follows
LIFELINE = "MINITRON_LIFELINE"  # if it is set, a launcher started the worker, and standard input is the lifeline


def tell(**message: object) -> None:
    """Prints a worker's line for its launcher, in one write, because other ranks print at the same time."""
    with contextlib.suppress(OSError):
        os.write(1, f"{MARK}{json.dumps(message)}\n".encode())
