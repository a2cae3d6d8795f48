"""Bytes into a file of the student: the teacher's, by way of a buffer that the processor's cache holds, where they are
looked through: a number that is not finite is not passed on. That takes a third more processor time than to let the
kernel copy whole runs, which sees nothing.

One thread writes to a file at a time. The system lets no two anyway, and those that wait for it there spin: with two
threads that cost as much processor time as the copy.
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

# Bytes of one write. For longer ones the system takes larger pages, which a virtual machine's host may have taken back:
# in some runs they cost more than the copy, in others nothing.
PIECE = 64 << 10
BUFFER = 256 << 10  # bytes that are read, looked through and written at a time


class Run(NamedTuple):
    """`size` bytes of a file from `position` on."""

    position: int
    size: int


@dataclasses.dataclass
class Sink:
    """Where one thread puts what follows: an open file, the next byte's position, the lock of those who write to it;
    the safetensors dtype of what comes, and the name of the tensor, for a refusal."""

    handle: int
    position: int
    turn: threading.Lock
    dtype: str
    name: str

    def write(self, block: np.ndarray) -> None:
        """All numbers of `block`, raw bits, in C order. Raises InputError where one is not finite."""
        block = np.ascontiguousarray(block)
        check_finite(block, self.dtype, self.name)
        view = block.reshape(-1).view(np.uint8).data
        with self.turn:
            while len(view):
                count = os.pwrite(self.handle, view[: PIECE - self.position % PIECE], self.position)
                view, self.position = view[count:], self.position + count

    def copy(self, file: Path, runs: list[Run]) -> None:
        """Runs of another file, whole numbers of elements each, one after another. Raises InputError where that file
        ends before them, or a number is not finite."""
        room = np.empty(BUFFER // np.dtype(RAW[self.dtype]).itemsize, RAW[self.dtype])
        with open(file, "rb", buffering=0) as source:
            for position, size in runs:
                for start in range(position, position + size, BUFFER):
                    part = room[: min(BUFFER, position + size - start) // room.itemsize]
                    _fill(source.fileno(), part.view(np.uint8).data, start, file)
                    self.write(part)


def _fill(handle: int, view: memoryview, position: int, file: Path) -> None:
    while len(view):
        count = os.preadv(handle, [view], position)
        if not count:
            raise InputError(f"'{file}' is no whole safetensors file: it ends at byte {position}")
        view, position = view[count:], position + count
