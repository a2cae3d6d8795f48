"""Temporary folders that live as long as their process; what a killed process leaves is removed by a later one.

A lock of the system (flock) on the folder tells whether its process is alive. A process number would not do: the lock
ends with the process however that ends, and it means the same in every container on a machine. If a file system has no
such locks, nothing is removed.
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

BESIDE = ".minitron-"  # part of the name of a folder beside its target: .NAME.minitron-abcd1234
APART = "minitron-tmp-"  # start of the name of a folder in the system's temporary folder
_BESIDE = re.compile(rf"\..*{re.escape(BESIDE)}[a-z0-9_]{{8}}")
_APART = re.compile(rf"{re.escape(APART)}[a-z0-9_]{{8}}")
_swept: set[Path] = set()


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Yields a hidden folder beside `path` and removes it afterwards; also removes what dead processes left there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.parent not in _swept:  # only once in a process: a cache writes many files into one folder
        _swept.add(path.parent)
        _sweep(path.parent, _BESIDE)
    with _locked_folder(path.parent, f".{path.name}{BESIDE}") as folder:
        yield folder


@contextlib.contextmanager
def apart() -> Iterator[Path]:
    """Yields a folder in the system's temporary folder and removes it afterwards; also removes what dead processes
    left."""
    place = Path(tempfile.gettempdir())
    _sweep(place, _APART)
    with _locked_folder(place, APART) as folder:
        yield folder


def sweep(folder: Path) -> None:
    """Removes what dead processes have left anywhere in a folder; the folders of live processes stay."""
    for place, _, _ in os.walk(folder):
        _sweep(Path(place), _BESIDE)


@contextlib.contextmanager
def _locked_folder(place: Path, prefix: str) -> Iterator[Path]:
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
        except FileNotFoundError:  # another process removed it before it was locked
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
    """Removes a folder that no live process has locked."""
    with contextlib.suppress(OSError):  # it belongs to a live process, or is gone already
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(handle)
