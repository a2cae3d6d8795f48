"""Whether this process was asked to save what it has and to end: set by its launcher, through the lifeline."""

from __future__ import annotations

import threading

ASKED = threading.Event()
SAVED = 143  # the exit code then: as of a process that SIGTERM has ended
