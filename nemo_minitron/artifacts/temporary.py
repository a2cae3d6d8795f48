"""Folders that are there for as long as their process: a lock says whether it lives, so what a kill leaves is removed.

A lock of the system (flock) on the folder itself, not a process' number: it goes with the process however that ends,
and it means the same in every container on a machine. Where a file system has no such locks nothing is removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

BESIDE = ".minitron-"  # in the name of a folder beside what it becomes: .NAME.minitron-abcd1234
APART = "minitron-tmp-"  # in the system's folder of temporary files
_BESIDE = re.compile(rf"\..*{re.escape(BESIDE)}[a-z0-9_]{{8}}")
_APART = re.compile(rf"{re.escape(APART)}[a-z0-9_]{{8}}")
_swept: set[Path] = set()


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A hidden folder in the folder of `path`, which is made; gone afterwards. What dead processes left there goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.parent not in _swept:  # once a process: a cache has many files in one folder
        _swept.add(path.parent)
        _sweep(path.parent, _BESIDE)
    with _held(path.parent, f".{path.name}{BESIDE}") as folder:
        yield folder


@contextlib.contextmanager
def apart() -> Iterator[Path]:
    """A folder in the system's folder of temporary files; gone afterwards. What dead processes left there goes."""
    place = Path(tempfile.gettempdir())
    _sweep(place, _APART)
    with _held(place, APART) as folder:
        yield folder


def sweep(folder: Path) -> None:
    """Removes what dead processes have left anywhere in a folder; what belongs to a living one stays."""
    for place, _, _ in os.walk(folder):
        _sweep(Path(place), _BESIDE)


@contextlib.contextmanager
def _held(place: Path, prefix: str) -> Iterator[Path]:
    folder, handle = _locked(place, prefix)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _locked(place: Path, prefix: str) -> tuple[Path, int]:
    """A new folder and the handle that holds its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(dir=place, prefix=prefix))
        try:
            handle = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # another process took it for litter, before its lock
            continue
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if folder.exists():
            return folder, handle
        os.close(handle)


def _sweep(place: Path, names: re.Pattern[str]) -> None:
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(place)):
            if names.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                _remove_dead(Path(entry.path))


def _remove_dead(folder: Path) -> None:
    """Removes a folder that no living process holds."""
    with contextlib.suppress(OSError):  # another's, or gone already
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(handle)
