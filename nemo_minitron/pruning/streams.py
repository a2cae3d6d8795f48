"""Bytes into a file of the student: whole runs of the teacher's by the kernel, as `cp` does it, the rest from memory.

One thread writes to a file at a time. The system lets no two anyway, and those that wait for it there spin: with two
threads that cost as much processor time as the copy.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from nemo_minitron.errors import InputError

# Bytes of one write. For longer ones the system takes larger pages, which a virtual machine's host may have taken back:
# in some runs they cost more than the copy, in others nothing.
PIECE = 64 << 10
TURN = 8 << 20  # bytes that the kernel copies before other threads may write
# What says that this kernel or file system does not copy from that one to this: then it goes through memory.
UNABLE = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)
_copy_file_range: Callable[..., int] | None = getattr(os, "copy_file_range", None)  # Linux alone has it


class Run(NamedTuple):
    """`size` bytes of a file from `position` on."""

    position: int
    size: int


@dataclasses.dataclass
class Sink:
    """Where one thread puts what follows: an open file, the next byte's position, the lock of those who write to it."""

    handle: int
    position: int
    turn: threading.Lock

    def write(self, block: np.ndarray) -> None:
        """All bytes of `block`, in C order."""
        view = np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
        with self.turn:
            while len(view):
                count = os.pwrite(self.handle, view[: PIECE - self.position % PIECE], self.position)
                view, self.position = view[count:], self.position + count

    def copy(self, file: Path, runs: list[Run]) -> None:
        """Runs of another file, one after another. Raises InputError where that file ends before them."""
        with open(file, "rb", buffering=0) as source:
            for position, size in runs:
                end = position + size
                while position < end:
                    with self.turn:
                        count = _copy(source, self.handle, min(TURN, end - position), position, self.position)
                        self.position += count
                    position += count


def _copy(source: BinaryIO, target: int, size: int, position: int, place: int) -> int:
    """Copies up to `size` bytes from `position` to `place`, by the kernel where it can; gives their count, above 0."""
    if _copy_file_range is not None:
        try:
            count = _copy_file_range(source.fileno(), target, size, position, place)
        except OSError as error:
            if error.errno not in UNABLE:
                raise
            count = 0
        if count:  # some file systems say 0 where they mean that they cannot
            return count
    block = os.pread(source.fileno(), min(size, PIECE), position)
    if not block:
        raise InputError(f"'{source.name}' is no whole safetensors file: it ends at byte {position}")
    return os.pwrite(target, block, place)
