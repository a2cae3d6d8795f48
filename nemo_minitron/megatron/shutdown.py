"""Whether this process was asked to save a checkpoint and to end. The worker sets it when its launcher asks."""

from __future__ import annotations

import threading

ASKED = threading.Event()
SAVED = 143  # the exit code afterwards, the same as that of a process that SIGTERM has ended
