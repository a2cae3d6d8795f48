"""A worker tells its launcher about its progress. From that the launcher finds the rank that holds all others up."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from nemo_minitron.launch.stall import EVERY, stall_timeout
from nemo_minitron.settings.progress import tell

_layers = [0]  # layers' forward passes so far; a list, so that the patched forward can change it


def begin() -> None:
    """Reports the progress now, and from now on in a thread. Does nothing if `--stall-timeout` is 0."""
    timeout = stall_timeout()
    if timeout:
        _report(0)
        threading.Thread(target=_report_again, args=(timeout / EVERY,), daemon=True).start()


def _report_again(seconds: float) -> None:
    """Reports every `seconds`, for as long as the process lives."""
    changes, stack_before = 0, None
    while True:
        stack = _main_stack()
        changes, stack_before = changes + (stack != stack_before), stack
        _report(changes)
        time.sleep(seconds)


def _report(changes: int) -> None:
    """Sends the launcher one line. A rank makes progress if its `mark` changes: its main thread has moved (`changes`),
    it has imported a module, a layer has run, or bytes have gone to or from a disk."""
    mark = [changes, len(sys.modules), _layers[0], *_disk_bytes()]
    tell(rank=int(os.environ.get("RANK", "0")), pid=os.getpid(), layers=_layers[0], mark=mark)


def _main_stack() -> list[tuple[str, str, int]]:
    """(file, function, instruction) of each frame of the main thread. It does not change while the thread waits in a
    collective."""
    frame, stack = sys._current_frames().get(threading.main_thread().ident or 0), []
    while frame is not None:
        stack.append((frame.f_code.co_filename, frame.f_code.co_name, frame.f_lasti))
        frame = frame.f_back
    return stack


def _disk_bytes() -> list[str]:
    """The lines of Linux that count the bytes that this process and its children have read from disks and written to
    them. Children save checkpoints. Empty on a system without these lines."""
    counts = []
    with contextlib.suppress(OSError):
        children = [pid for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()]
        for pid in ("self", *children):
            lines = Path(f"/proc/{pid}/io").read_text().splitlines()
            counts += [line for line in lines if line.startswith(("read_bytes", "write_bytes"))]
    return counts


def count_layers() -> None:
    """Counts each layer's forward pass from now on. A step may take long, and its main thread may wait in one place
    while the layers run."""
    from megatron.core.transformer.transformer_layer import TransformerLayer

    original = TransformerLayer.forward

    @functools.wraps(original)
    def forward(self: Any, *arguments: Any, **options: Any) -> Any:
        _layers[0] += 1
        return original(self, *arguments, **options)

    TransformerLayer.forward = forward
