"""A lock on a folder: one command works in it at a time. The system releases the lock however the process ends."""

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
    """Locks `folder` for the block, and makes it if it does not exist. Raises InputError if another process has it.

    Files that dead processes have left half-written are removed. The lock is flock's, so it also holds on other
    machines if their file system shares flock's locks. The file `.lock` stays; it has the number of the last process.
    If the block raises InputError before it has written anything, a folder that was made here is removed.
    """
    folder = Path(folder)
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    # Not filelock: some of its versions empty the file when they try, and the refusal could not name the process.
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
    """Writes this process's number to the lock file. On a full disk it cannot, but a command that frees space must
    still run."""
    with contextlib.suppress(OSError):
        os.ftruncate(file, 0)
        os.write(file, f"{os.getpid()}\n".encode())
