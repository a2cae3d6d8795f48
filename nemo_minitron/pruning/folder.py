"""A Hugging Face folder as a TensorSource: bytes by pread, no torch, no mmap.

A mapped file counts into the process's peak memory and is slower here than reading the rows that stay.
"""

from __future__ import annotations

import itertools
import math
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np

from nemo_minitron.artifacts.digest import Index
from nemo_minitron.errors import InputError
from nemo_minitron.families import family_of, read_config
from nemo_minitron.pruning.headers import SIZES, Entry, read_header, shards
from nemo_minitron.pruning.streams import Run
from nemo_minitron.pruning.tensors import RAW

MOST = 1024  # buffers of one call, the system's limit
LEAST = 1 << 20  # bytes of a run, on average, from which on the kernel copies them
_GAP = memoryview(bytearray(64 << 10))


class HFSource:
    """The safetensors of a Hugging Face folder, under canonical names; reading is safe from several threads.

    `architecture`, `config` (the folder's, as a dict), `family` and `folder` are public; `block` is how many bytes
    of rows one read had best take (see `pruning/write.py`).

    Raises InputError where config and files contradict each other: a tensor that nothing claims, one that is
    missing, a shape or dtype that is not what the config says, a damaged file, weights only as a pickle.
    """

    block = 1 << 20

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = read_config(self.folder)
        self.family = family_of(self.config)
        self.architecture = self.family.architecture(self.config)
        stored = _stored(self.folder)
        experts = (self.architecture.num_moe_experts or 0) * len(self.architecture.moe_layers)
        for count, what in ((self.architecture.num_layers, "layers"), (experts, "experts")):
            if count > len(stored):  # before anything as long as the model is built
                raise InputError(
                    f"the config of '{self.folder}' speaks of {count} {what}, its files hold {len(stored)} tensors"
                )
        self._shapes = self.architecture.shapes()
        self._places = self._claim(stored)

    def dtype(self, name: str) -> str:
        """The safetensors name of the dtype that stores canonical tensor `name`."""
        return self._place(name)[0].dtype

    def read(self, name: str, index: Index) -> np.ndarray:
        """Raw bits (uint16, uint32, uint64) of the outer product of sorted indices, as a new array.

        Only the runs of rows in `index[0]` are read; the other dimensions are picked from them in memory.
        Raises InputError where the file has become shorter since it was opened.
        """
        entry, first = self._place(name)
        rows, *rest = index
        row = entry.shape[1:]
        block: np.ndarray
        if not row:  # a vector: elements are too small to be read one by one
            block = _read_rows(entry, np.arange(first, first + self._shapes[name][0]), row)[rows]
        else:
            block = _read_rows(entry, rows + first, row)
        for dim, kept in enumerate(rest, start=1):
            if len(kept) != block.shape[dim]:
                _check_range(kept, block.shape[dim])
                block = block.take(kept, axis=dim, mode="wrap")  # a third faster than the mode that checks
        return block

    def runs(self, name: str, index: Index) -> tuple[Path, list[Run]] | None:
        """The file and the runs of bytes that hold the outer product of sorted indices, if those are long on average.

        None where columns are picked, where runs are short (many small copies by the kernel take longer than reading
        and writing them), and where nothing is to be had.
        """
        entry, first = self._place(name)
        rows, *rest = index
        if not len(rows) or any(len(kept) != size for kept, size in zip(rest, entry.shape[1:], strict=True)):
            return None
        _check_range(rows + first, entry.shape[0])
        step = math.prod(entry.shape[1:]) * SIZES[entry.dtype]
        bounds = _bounds(rows)
        if len(rows) * step < LEAST * (len(bounds) - 1) and len(bounds) > 2:
            return None
        spans = zip(rows[bounds[:-1]].tolist(), itertools.pairwise(bounds), strict=True)
        return entry.file, [Run(entry.start + (first + r) * step, (b - a) * step) for r, (a, b) in spans]

    def _place(self, name: str) -> tuple[Entry, int]:
        if name not in self._places:
            raise InputError(f"'{self.folder}' has no tensor '{name}'")
        return self._places[name]

    def _claim(self, stored: dict[str, Entry]) -> dict[str, tuple[Entry, int]]:
        """Canonical name -> (stored tensor, first row in it); the mapping is total in both directions."""
        wanted = self.family.hf_tensors(self.architecture)
        places: dict[str, tuple[Entry, int]] = {}
        for name, parts in wanted.items():
            entry = _checked(self.folder, name, stored, [self._shapes[part] for part in parts])
            first = 0
            for part in parts:
                places[part] = (entry, first)
                first += self._shapes[part][0]
        self._refuse_unclaimed(stored.keys() - wanted.keys())
        return places

    def _refuse_unclaimed(self, names: set[str]) -> None:
        tied = {n for n, parts in self.family.tensors.items() if parts == ("head.weight",)}
        known = tied if self.architecture.tied_embeddings else set()
        unclaimed = {n for n in names if not n.endswith(self.family.ignored)} - known
        if unclaimed:
            raise InputError(
                f"'{self.folder}' has the tensor '{min(unclaimed)}', "
                f"which its config ({self.family.hf_class}) does not speak of"
            )


def _stored(folder: Path) -> dict[str, Entry]:
    stored: dict[str, Entry] = {}
    for file, promised in shards(folder):
        entries = read_header(file)
        absent, twice = promised - entries.keys(), stored.keys() & entries.keys()
        if absent:
            raise InputError(f"'{file}' lacks the tensor '{min(absent)}' that the index puts there")
        if twice:
            raise InputError(f"'{folder}' has the tensor '{min(twice)}' in two shards")
        stored |= entries
    return stored


def _checked(folder: Path, name: str, stored: dict[str, Entry], parts: list[tuple[int, ...]]) -> Entry:
    if name not in stored:
        raise InputError(f"'{folder}' lacks the tensor '{name}' that its config speaks of")
    entry, shape = stored[name], (sum(part[0] for part in parts), *parts[0][1:])
    if entry.shape != shape:
        raise InputError(f"'{name}' in '{folder}' is {entry.shape}; its config says {shape}")
    if entry.dtype not in RAW:
        raise InputError(f"'{name}' in '{folder}' is stored as {entry.dtype}; legal are {', '.join(RAW)}")
    return entry


def _check_range(kept: np.ndarray, size: int) -> None:
    """Of sorted indices."""
    if len(kept) and not 0 <= kept[0] <= kept[-1] < size:
        raise IndexError(f"{kept[0]} to {kept[-1]} of a dimension of {size}")


def _read_rows(entry: Entry, rows: np.ndarray, row: tuple[int, ...]) -> np.ndarray:
    """Sorted rows of a stored tensor, [len(rows), *row] as raw bits."""
    _check_range(rows, entry.shape[0])
    block = np.empty((len(rows), *row), RAW[entry.dtype])
    if not len(rows):
        return block
    step = math.prod(row) * SIZES[entry.dtype]
    view = block.reshape(-1).view(np.uint8).data
    bounds = _bounds(rows)
    runs = [
        (entry.start + first * step, view[begin * step : end * step])
        for first, (begin, end) in zip(rows[bounds[:-1]].tolist(), itertools.pairwise(bounds), strict=True)
    ]
    with open(entry.file, "rb", buffering=0) as stream:
        _fill(stream, runs)
    return block


def _bounds(rows: np.ndarray) -> list[int]:
    """Where runs of neighbours begin among sorted rows, and the end of the last one."""
    return [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]


def _fill(stream: BinaryIO, runs: list[tuple[int, memoryview]]) -> None:
    """Reads (position in the file, where to) in order. Short gaps are read too, into `_GAP`, and forgotten: a call that
    skips nothing takes less time than one for each run."""
    views: list[memoryview] = []
    first = last = 0
    for position, view in runs:
        if views and (position - last > len(_GAP) or len(views) > MOST - 2):
            _read(stream, views, first)
            views = []
        if views:
            views.append(_GAP[: position - last])
        else:
            first = position
        views.append(view)
        last = position + len(view)
    if views:
        _read(stream, views, first)


def _read(stream: BinaryIO, views: list[memoryview], position: int) -> None:
    """Fills the views, one after another, from `position` on."""
    wanted = sum(map(len, views))
    while wanted:
        count = os.preadv(stream.fileno(), views, position)
        if not count:
            raise InputError(f"'{stream.name}' is no whole safetensors file: it ends at byte {position}")
        wanted, position = wanted - count, position + count
        if wanted:
            views = _after(views, count)


def _after(views: list[memoryview], count: int) -> list[memoryview]:
    """What is left of the views when their first `count` bytes are taken off."""
    for number, view in enumerate(views):
        if count < len(view):
            return [view[count:], *views[number + 1 :]]
        count -= len(view)
    return []
