"""How far a worker is, said to its launcher, which finds the rank that holds all others."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from nemo_minitron.launch.output import tell
from nemo_minitron.launch.stall import EVERY, stall_timeout

_layers = [0]


def begin() -> None:
    """Says it now, and from now on in a thread."""
    timeout = stall_timeout()
    if timeout:
        _tell(0)
        threading.Thread(target=_say, args=(timeout / EVERY,), daemon=True).start()


def _say(seconds: float) -> None:
    changes, before = 0, None
    while True:
        place = _place()
        changes, before = changes + (place != before), place
        _tell(changes)
        time.sleep(seconds)


def _tell(changes: int) -> None:
    mark = [changes, len(sys.modules), _layers[0], *_moved()]
    tell(rank=int(os.environ.get("RANK", "0")), pid=os.getpid(), layers=_layers[0], mark=mark)


def _place() -> Any:
    """Where the main thread is: one that waits in a collective stays where it is."""
    frame, found = sys._current_frames().get(threading.main_thread().ident or 0), []
    while frame is not None:
        found.append((frame.f_code.co_filename, frame.f_code.co_name, frame.f_lasti))
        frame = frame.f_back
    return found


def _moved() -> list[str]:
    """Bytes that this process and its children, which save checkpoints, have read from disks and written to them;
    nothing where the system does not say."""
    found = []
    with contextlib.suppress(OSError):
        children = [pid for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()]
        for pid in ("self", *children):
            lines = Path(f"/proc/{pid}/io").read_text().splitlines()
            found += [line for line in lines if line.startswith(("read_bytes", "write_bytes"))]
    return found


def count_layers() -> None:
    """Each layer that a model goes through counts: a step takes long, and its main thread may wait in one place."""
    from megatron.core.transformer.transformer_layer import TransformerLayer

    original = TransformerLayer.forward

    @functools.wraps(original)
    def forward(self: Any, *arguments: Any, **options: Any) -> Any:
        _layers[0] += 1
        return original(self, *arguments, **options)

    TransformerLayer.forward = forward
