"""Seals: the size and a cheap digest of a finished file, which tell later whether it was damaged."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from nemo_minitron.artifacts.files import sync
from nemo_minitron.artifacts.json_types import JsonObject

SMALL = 4 << 20  # bytes; a larger file is sampled in pieces, so that a student of any size takes milliseconds
PIECES, PIECE = 256, 4096

Seal = JsonObject  # {"bytes": size, "digest": of the bytes}


def seal(file: Path) -> Seal:
    """A file's size and a digest of its bytes; for a large file, of 256 pieces that include the first and the last."""
    with open(file, "rb", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size
        digest = hashlib.blake2b(digest_size=16)
        for position, length in _pieces(size):
            digest.update(os.pread(stream.fileno(), length, position))
    return {"bytes": size, "digest": digest.hexdigest()}


def _pieces(size: int) -> Iterator[tuple[int, int]]:
    if size <= SMALL:
        yield 0, size
        return
    for number in range(PIECES):
        yield number * (size - PIECE) // (PIECES - 1), PIECE


def sealed(folder: Path, paths: Iterable[str]) -> dict[str, Seal]:
    """Path in `folder` -> seal, for the files at `paths` and all files in the folders there; syncs them to the disk."""
    seals, places = {}, set()
    for file in sorted({file for path in paths for file in _files(folder / path)}):
        sync(file)
        seals[file.relative_to(folder).as_posix()] = seal(file)
        places |= {place for place in file.parents if folder == place or folder in place.parents}
    for place in sorted(places):
        sync(place)
    return seals


def _files(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path] if path.is_file() else []


def damaged(folder: Path, seals: Mapping[str, Seal]) -> dict[str, str]:
    """Path -> what is wrong with it in words, for each file that does not match its seal."""
    faults = {name: _wrong(folder / name, expected) for name, expected in seals.items()}
    return {name: why for name, why in faults.items() if why}


def _wrong(file: Path, expected: Seal) -> str:
    if not file.is_file():
        return "is gone"
    if (size := file.stat().st_size) != expected["bytes"]:
        return f"has {size:,} of its {expected['bytes']:,} bytes"
    return "" if seal(file) == {name: expected[name] for name in ("bytes", "digest")} else "was changed"


def take_away(folder: Path, names: Iterable[str]) -> None:
    """Removes damaged files, so that no later stage goes on from them."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
