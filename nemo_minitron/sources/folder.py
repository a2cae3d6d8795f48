"""A Hugging Face folder as a TensorSource: reads bytes with pread, without torch and without mmap.

A mapped file would count into the process's peak memory, and is slower here than reading only the rows that stay.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np

from nemo_minitron.artifacts.digest import Index
from nemo_minitron.errors import InputError
from nemo_minitron.families import family_of, read_config
from nemo_minitron.sources.headers import SIZES, Entry, read_header, shards
from nemo_minitron.sources.streams import ByteRange, Sink
from nemo_minitron.sources.tensors import RAW, ModelSource

MOST = 1024  # the system's limit of buffers in one call
LEAST = 1 << 20  # bytes; if runs of rows are longer on average, each is copied by itself
# Bytes of rows in a block. A block is read, picked from and written within the processor's cache; blocks of 16 MB took
# more than twice the processor time.
BLOCK = 1 << 20
UNIT = 8  # neighbouring columns that are picked as one
_GAP = memoryview(bytearray(64 << 10))


class HFSource(ModelSource):
    """The safetensors of a Hugging Face folder, under canonical names; reading is safe from several threads.

    `architecture`, `config` (the folder's, as a dict), `family` and `folder` are public.

    Raises InputError if config and files contradict each other (a tensor that the config does not mention, a missing
    one, another shape or dtype), if a file is damaged, and if the weights exist only as a pickle.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = self.path = Path(folder)
        self.config = read_config(self.folder)
        self.family = family_of(self.config)
        self.architecture = self.family.architecture(self.config)
        stored = _stored(self.folder)
        experts = (self.architecture.num_moe_experts or 0) * len(self.architecture.moe_layers)
        for count, what in ((self.architecture.num_layers, "layers"), (experts, "experts")):
            if count > len(stored):  # checked before anything of the model's size is built
                raise InputError(
                    f"the config of '{self.folder}' has {count} {what}, its files hold {len(stored)} tensors"
                )
        self._shapes = self.architecture.shapes()
        self._places = self._claim(stored)

    def dtype(self, name: str) -> str:
        """The safetensors name of the dtype that stores canonical tensor `name`."""
        return self._place(name)[0].dtype

    def read(self, name: str, index: Index) -> np.ndarray:
        """Raw bits (uint16, uint32, uint64) of the outer product of sorted indices, as a new array.

        Only the rows in `index[0]` are read; the other dimensions are picked from them in memory.
        Raises InputError if the file has become shorter since it was opened.
        """
        entry, first = self._place(name)
        rows, *rest = index
        row = entry.shape[1:]
        block: np.ndarray
        if not row:  # a vector: single elements are too small to be read one by one
            block = _read_rows(entry, np.arange(first, first + self._shapes[name][0]), row)[rows]
        else:
            block = _read_rows(entry, rows + first, row)
        for dim, kept in enumerate(rest, start=1):
            block = _picked(block, dim, kept)
        return block

    def stream(self, name: str, index: Index, sink: Sink) -> None:
        """Writes the outer product of sorted indices into `sink`.

        Long runs of complete rows are copied directly; anything else is read in blocks of rows, picked from, and
        written. Raises what `read` and `Sink` raise."""
        entry, first = self._place(name)
        rows, *rest = index
        step = math.prod(entry.shape[1:]) * SIZES[entry.dtype]
        whole_rows = all(len(kept) == size for kept, size in zip(rest, entry.shape[1:], strict=True))
        if whole_rows and len(runs := _runs(rows)) * LEAST <= max(LEAST, len(rows) * step):
            _check_range(rows + first, entry.shape[0])
            at = entry.start + first * step
            sink.copy(entry.file, [ByteRange(at + row * step, count * step) for row, count in runs])
            return
        height = max(1, BLOCK // step)
        for begin in range(0, len(rows), height):
            sink.write(self.read(name, (rows[begin : begin + height], *rest)))

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
                f"which its config ({self.family.hf_class}) does not mention"
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
        raise InputError(f"'{folder}' lacks the tensor '{name}' that its config needs")
    entry, shape = stored[name], (sum(part[0] for part in parts), *parts[0][1:])
    if entry.shape != shape:
        raise InputError(f"'{name}' in '{folder}' is {entry.shape}; its config says {shape}")
    if entry.dtype not in RAW:
        raise InputError(f"'{name}' in '{folder}' is stored as {entry.dtype}; legal are {', '.join(RAW)}")
    return entry


def _check_range(kept: np.ndarray, size: int) -> None:
    """Raises IndexError if sorted indices leave a dimension of `size`."""
    if len(kept) and not 0 <= kept[0] <= kept[-1] < size:
        raise IndexError(f"{kept[0]} to {kept[-1]} of a dimension of {size}")


def _picked(block: np.ndarray, dim: int, kept: np.ndarray) -> np.ndarray:
    """The positions `kept` (sorted) of one dimension, picked by the cheapest way that numpy has."""
    if len(kept) == block.shape[dim]:
        return block
    _check_range(kept, block.shape[dim])
    unit = f"V{UNIT * block.itemsize}"
    # mode "wrap" takes a third less time than the mode that checks the range
    if dim < block.ndim - 1 or not _in_units(kept, block.shape[dim]):
        return block.take(kept, axis=dim, mode="wrap")
    return block.view(unit).take(kept[::UNIT] // UNIT, axis=dim, mode="wrap").view(block.dtype)


def _in_units(kept: np.ndarray, size: int) -> bool:
    """Whether sorted positions consist of complete units of `UNIT` neighbours, as the columns of heads do."""
    if size % UNIT or len(kept) % UNIT:
        return False
    first, last = kept[::UNIT], kept[UNIT - 1 :: UNIT]
    return bool(np.all(first % UNIT == 0) and np.all(last - first == UNIT - 1))


def _read_rows(entry: Entry, rows: np.ndarray, row: tuple[int, ...]) -> np.ndarray:
    """Sorted rows of a stored tensor, [len(rows), *row] as raw bits."""
    _check_range(rows, entry.shape[0])
    block = np.empty((len(rows), *row), RAW[entry.dtype])
    if not len(rows):
        return block
    step = math.prod(row) * SIZES[entry.dtype]
    view = block.reshape(-1).view(np.uint8).data
    done, runs = 0, []
    for first, count in _runs(rows):
        runs.append((entry.start + first * step, view[done : done + count * step]))
        done += count * step
    with open(entry.file, "rb", buffering=0) as stream:
        _fill(stream, runs)
    return block


def _runs(rows: np.ndarray) -> list[tuple[int, int]]:
    """Sorted rows -> (first, count) of each run of neighbours."""
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1:
        return [(int(rows[0]), len(rows))]
    bounds = np.flatnonzero(np.diff(rows, prepend=rows[:1] - 2) != 1)
    counts = np.diff(bounds, append=len(rows))
    return list(zip(rows[bounds].tolist(), counts.tolist(), strict=True))


def _fill(stream: BinaryIO, runs: list[tuple[int, memoryview]]) -> None:
    """Reads (position in the file, target) in order. Short gaps are read too, into `_GAP`, and ignored: one call that
    skips nothing takes less time than a call for each run."""
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
    """Fills the views, one after another, with the bytes from `position` on."""
    wanted = sum(map(len, views))
    while wanted:
        count = os.preadv(stream.fileno(), views, position)
        if not count:
            raise InputError(f"'{stream.name}' is not a complete safetensors file: it ends at byte {position}")
        wanted, position = wanted - count, position + count
        if wanted:
            views = _after(views, count)


def _after(views: list[memoryview], count: int) -> list[memoryview]:
    """The rest of the views after their first `count` bytes."""
    for number, view in enumerate(views):
        if count < len(view):
            return [view[count:], *views[number + 1 :]]
        count -= len(view)
    return []
