"""One line that says what ended a worker: a full disk and its path, a lack of memory, or the error itself."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from nemo_minitron.errors import DISK, first_line

FULL = 1 << 20  # a disk with fewer free bytes counts as full
LONGEST = 1000  # characters: a line of this length reaches the launcher in one piece
_MEMORY = re.compile(r"out of memory|can't allocate memory|Cannot allocate memory|bad_alloc", re.IGNORECASE)
_WRITES = re.compile(r"No space left|PytorchStreamWriter|os error 28|Disk quota|File too large")


def words(error: BaseException, place: str | Path) -> str:
    """The sentence for an error and the errors that led to it. `place`: where the stage writes.

    The errors' whole chain matters: NeMo and Megatron often raise an error of their own, from that of a full disk.
    """
    chain = list(_chain(error))
    for one in chain:
        if isinstance(one, OSError) and one.errno in DISK:
            return f"{os.strerror(one.errno)}: '{one.filename or place}' could not be written"
    for one in chain:
        if _WRITES.search(str(one)):
            return f"'{place}' could not be written: {_why(place) or first_line(one)}"[:LONGEST]
    for one in chain:
        if isinstance(one, MemoryError) or _MEMORY.search(str(one)):
            return f"it ran out of memory ({type(one).__name__}: {first_line(one)})"[:LONGEST]
    return f"{type(error).__name__}: {first_line(error)}"[:LONGEST]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, its cause, the cause of that, and so on. Two errors may name each other as their cause."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _why(place: str | Path) -> str:
    """Says that the disk is full, if it is; empty otherwise."""
    folder = Path(place).absolute()
    while not folder.exists():
        folder = folder.parent
    return "No space left on device" if shutil.disk_usage(folder).free < FULL else ""
