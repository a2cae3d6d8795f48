"""Where a command writes: refused at once if it cannot, and the hidden folder that it works in."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from nemo_minitron.errors import InputError
from nemo_minitron.launch.lock import locked


def check_file(out: Path, overwrite: bool = True) -> None:
    """Raises InputError, in the first second, for a file `out` that could not be written at the end, and for one that
    exists, unless `overwrite`."""
    if out.is_dir():
        raise InputError(f"'{out}' is a folder; give the name of a file with --out, for example {out / 'result'}")
    if out.exists() and not overwrite:
        raise InputError(f"'{out}' already exists; give another file with --out, or --overwrite")
    check_writable(out)


def check_writable(out: Path) -> None:
    """Raises InputError if a file or folder `out` could not be made where it is to lie."""
    existing = out.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    inside = existing if existing.is_dir() else existing.parent
    if existing != out.absolute() and not existing.is_dir():
        raise InputError(f"'{out}' cannot be written: '{existing}' is a file, not a folder; give another --out")
    if not os.access(inside, os.W_OK, effective_ids=True):
        raise InputError(f"'{out}' cannot be written: you may not write to '{inside}'; give another --out")


def cache_of(out: Path) -> Path:
    """The hidden folder beside the result `out`, in which a command keeps its tokens and what it resumes from."""
    return out.parent / f".{out.name}.work"


@contextlib.contextmanager
def working(out: Path) -> Iterator[Path]:
    """Yields the locked hidden folder beside `out`. It stays if the block fails, because the same command resumes from
    it, and is removed after success. Raises InputError as `locked`."""
    work = cache_of(out)
    with locked(work):
        yield work
        shutil.rmtree(work, ignore_errors=True)
