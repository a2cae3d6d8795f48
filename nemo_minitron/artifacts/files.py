"""Atomic files and folders: a kill leaves the old content or the new one, never half of it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from nemo_minitron.artifacts.json_types import Json
from nemo_minitron.artifacts.parse import Kind, checked, unique
from nemo_minitron.artifacts.temporary import BESIDE, beside
from nemo_minitron.errors import DISK, InputError, first_line

LARGEST_JSON = 1 << 30  # bytes; a plan of the largest models has a tenth of this


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path; when the block ends without an error, the file is synced and takes the name `path`.

    Raises OSError that names `path` if the disk is full or fails.
    """
    path = Path(path)
    with naming(path), beside(path) as folder:
        temporary = folder / path.name
        temporary.touch()
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())  # only now: the writer may have replaced the file that was touched
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)


@contextlib.contextmanager
def atomic_folder(path: str | Path, *, durable: bool = False) -> Iterator[Path]:
    """Yields a temporary folder; when the block ends without an error, the folder replaces `path`.

    If the file system can exchange two names, a kill at any moment leaves the old folder or the new one at `path`.
    Elsewhere there is one moment at which a kill leaves the old folder under a hidden name. `durable`: the folder is
    synced before it takes the name; a folder that replaces another one is always synced. Without it the bytes reach
    the disk whenever the system writes them, as with `cp`.
    Raises OSError that names `path` if the disk is full or fails.
    """
    path = Path(path)
    with naming(path), beside(path) as folder:
        temporary = folder / path.name
        temporary.mkdir()
        yield temporary
        if durable or path.exists():
            sync_tree(temporary)
        old = path.with_name(f".{path.name}.old-{os.getpid()}")
        if not path.exists():
            os.replace(temporary, path)
        elif not _exchange(temporary, path):
            os.replace(path, old)
            os.replace(temporary, path)
            shutil.rmtree(old, ignore_errors=True)
        sync(path.parent)


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Makes a disk error name `path` if it names no file or a temporary one; also the errors of libraries in Rust."""
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None) if isinstance(error, OSError) else _number(error)
        name = getattr(error, "filename", None)
        if number is not None and (BESIDE in str(name) or (name is None and number in DISK)):
            raise OSError(number, os.strerror(number), str(path)) from error
        raise


def _number(error: Exception) -> int | None:
    match = re.search(r"\(os error (\d+)\)", str(error))
    return int(match[1]) if match else None


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names in one step (Linux's renameat2); False if the system has no such call."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except AttributeError:
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(here, os.fsencode(one), here, os.fsencode(other), swap) == 0


def reserve(handle: int, size: int) -> None:
    """Makes an open file `size` bytes long and, if the file system can (Linux's fallocate), allocates its blocks.

    So a disk that is too small is found before the work, and each write has less to do.
    Raises OSError if the disk has no room.
    """
    os.ftruncate(handle, size)
    try:
        # not os.posix_fallocate: it writes into every block if the file system cannot allocate
        fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    except AttributeError:
        return
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if fallocate(handle, 0, 0, size) and (number := ctypes.get_errno()) in (errno.ENOSPC, errno.EDQUOT):
        raise OSError(number, os.strerror(number))


def _umask() -> int:
    """The process's umask; the system returns it only when a new one is set."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync(path: Path) -> None:
    """Writes a file's bytes, or a folder's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # this file system cannot sync folders
            raise
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Syncs a folder and all files and folders in it."""
    for place, _, files in os.walk(folder):
        for name in files:
            sync(Path(place, name))
        sync(Path(place))


def write_json(path: str | Path, value: object) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(_lines(value, "\n") + "\n")


def _lines(value: object, start: str) -> str:
    """JSON with one item a line, but a list of plain values on one line: this writes the many numbers of a plan in a
    quarter of the time. `start`: what begins a line at this depth."""
    deeper = start + " "
    if isinstance(value, dict) and value:
        named = (json.dumps({key: 0})[1:-2] + _lines(item, deeper) for key, item in value.items())  # '"key": '
        return "{" + ",".join(deeper + item for item in named) + start + "}"
    if isinstance(value, (list, tuple)) and not {dict, list, tuple}.isdisjoint(map(type, value)):
        return "[" + ",".join(deeper + _lines(item, deeper) for item in value) + start + "]"
    return json.dumps(value)


def read_json(path: str | Path, what: str, kind: Kind | None = None) -> Json:
    """The values of a JSON file; if a `kind` is given, they are checked against it.

    Raises InputError if `path` is missing, is not JSON or is of another kind; `what` names the file in the sentence.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > LARGEST_JSON:
                raise InputError(f"{what} '{path}' has {size} bytes; legal are at most {LARGEST_JSON}")
            values = parse_json(file.read())
    except FileNotFoundError:
        raise InputError(f"{what} '{path}' does not exist") from None
    except IsADirectoryError:
        raise InputError(f"{what} '{path}' is a folder; a file is needed") from None
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{what} '{path}' is not valid JSON ({first_line(error)})") from None
    return values if kind is None else checked(values, kind, f"{what} '{path}'")


def parse_json(text: str | bytes) -> Json:
    """Raises ValueError if `text` is not JSON, is nested too deeply, or gives a name two values."""
    try:
        return json.loads(text.decode() if isinstance(text, bytes) else text, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def digest_of(value: object) -> str:
    """sha256 of a plain value, written as canonical JSON; in hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_digest(path: str | Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


def bytes_in(folder: Path) -> int:
    """The number of bytes that a folder takes on its disk."""
    return sum(os.lstat(Path(place, name)).st_blocks * 512 for place, _, files in os.walk(folder) for name in files)


def need_space(folder: str | Path, size: int) -> None:
    """Raises InputError if the disk under `folder` has fewer than `size` free bytes."""
    existing = Path(folder).absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < size:
        raise InputError(
            f"'{folder}' needs {size / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free; "
            "free some space or choose a folder on another disk"
        )
