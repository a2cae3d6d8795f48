"""Copies bytes of the teacher into a file of the student, through a buffer that fits into the processor's cache.

In the buffer the numbers are checked: a number that is not finite is refused. This takes a third more processor time
than a copy by the kernel, which cannot check.

One thread writes to a file at a time. The system allows only one anyway, and threads that wait for it there spin: with
two threads that cost as much processor time as the copy.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nemo_minitron.errors import InputError
from nemo_minitron.sources.finite import check_finite
from nemo_minitron.sources.tensors import RAW

# Bytes of one write. For longer writes the system uses larger pages, which the host of a virtual machine may have taken
# back: in some runs they cost more than the copy, in others nothing.
PIECE = 64 << 10
BUFFER = 256 << 10  # bytes that are read, checked and written at a time


class ByteRange(NamedTuple):
    """`size` bytes of a file from `position` on."""

    position: int
    size: int


@dataclasses.dataclass
class Sink:
    """The place in an open file that one thread writes a tensor to.

    `position`: of the next byte; `turn`: the lock that all writers of the file share; `dtype`: the tensor's safetensors
    dtype; `name`: the tensor's name, for a refusal."""

    handle: int
    position: int
    turn: threading.Lock
    dtype: str
    name: str

    def write(self, block: np.ndarray) -> None:
        """Writes `block`, raw bits, in C order. Raises InputError if a number is not finite."""
        block = np.ascontiguousarray(block)
        check_finite(block, self.dtype, self.name)
        view = block.reshape(-1).view(np.uint8).data
        with self.turn:
            while len(view):
                count = os.pwrite(self.handle, view[: PIECE - self.position % PIECE], self.position)
                view, self.position = view[count:], self.position + count

    def copy(self, file: Path, ranges: list[ByteRange]) -> None:
        """Copies ranges of another file one after another; each holds complete elements.

        Raises InputError if that file ends too early, or a number is not finite."""
        room = np.empty(BUFFER // np.dtype(RAW[self.dtype]).itemsize, RAW[self.dtype])
        with open(file, "rb", buffering=0) as source:
            for position, size in ranges:
                for start in range(position, position + size, BUFFER):
                    part = room[: min(BUFFER, position + size - start) // room.itemsize]
                    _fill(source.fileno(), part.view(np.uint8).data, start, file)
                    self.write(part)


def _fill(handle: int, view: memoryview, position: int, file: Path) -> None:
    while len(view):
        count = os.preadv(handle, [view], position)
        if not count:
            raise InputError(f"'{file}' is not a complete safetensors file: it ends at byte {position}")
        view, position = view[count:], position + count
