"""One command a folder: a lock that the system lets go of however its process ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from nemo_minitron.artifacts.temporary import sweep
from nemo_minitron.errors import InputError

LOCK = ".lock"


@contextlib.contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Holds `folder` (made where it is not there); raises InputError where another process does. What dead processes
    have left half-written in it is removed.

    The file `.lock` stays and says who was last; the lock is flock's, on machines that share it. A folder that was made
    here goes again where the block refuses its input before it has written anything.
    """
    folder = Path(folder)
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            who = file.read().strip() or "unknown"
            raise InputError(
                f"'{folder}' is in use by another minitron (process {who}); wait for its end, "
                "or give another folder with --out"
            ) from None
        sweep(folder)
        _sign(file.fileno())
        try:
            yield
        except InputError:
            if new and [path.name for path in folder.iterdir()] == [LOCK]:  # refused before anything was done
                shutil.rmtree(folder)
            raise


def _sign(file: int) -> None:
    """A full disk has no place for who it is, and a command that makes place must run all the same."""
    with contextlib.suppress(OSError):
        os.ftruncate(file, 0)
        os.write(file, f"{os.getpid()}\n".encode())
