"""A Hugging Face folder as a TensorSource: reads bytes with pread, without torch and without mmap.

A mapped file would count into the process's peak memory, and is slower here than reading only the rows that stay.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path

import numpy as np

from nemo_minitron.artifacts.digest import Index
from nemo_minitron.artifacts.json_types import JsonObject
from nemo_minitron.errors import InputError
from nemo_minitron.families import family_of, read_config
from nemo_minitron.sources import stacks
from nemo_minitron.sources.headers import SIZES, Entry, read_header, shards
from nemo_minitron.sources.rows import check_range, read_rows, runs_of
from nemo_minitron.sources.streams import ByteRange, Sink
from nemo_minitron.sources.tensors import RAW, ModelSource

LEAST = 1 << 20  # bytes; if runs of rows are longer on average, each is copied by itself
# Bytes of rows in a block. A block is read, picked from and written within the processor's cache; blocks of 16 MB took
# more than twice the processor time.
BLOCK = 1 << 20
UNIT = 8  # neighbouring columns that are picked as one


class HFSource(ModelSource):
    """The safetensors of a Hugging Face folder, under canonical names; reading is safe from several threads.

    `architecture`, `config` (the folder's, as a dict), `family` and `folder` are public.

    Raises InputError if config and files contradict each other (a tensor that the config does not mention, a missing
    one, another shape or dtype), if a file is damaged, and if the weights exist only as a pickle.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = self.path = Path(folder)
        self.config = self.read_config()
        self.family = family_of(self.config)
        self.architecture = self.family.architecture(self.config)
        aliases = self.family.aliases
        stored = {aliases.get(name, name): entry for name, entry in self.stored().items()}
        experts = (self.architecture.num_moe_experts or 0) * len(self.architecture.moe_layers)
        for count, what in ((self.architecture.num_layers, "layers"), (experts, "experts")):
            if count > len(stored):  # checked before anything of the model's size is built
                raise InputError(
                    f"the config of '{self.folder}' has {count} {what}, its files hold {len(stored)} tensors"
                )
        self._shapes = self.architecture.shapes()
        self._stacked: dict[str, stacks.Part] = {}
        self._places = self._claim(stored)

    def read_config(self) -> JsonObject:
        """The config in the folder, in the form of transformers 4."""
        return read_config(self.folder)

    def stored(self) -> dict[str, Entry]:
        """Hugging Face name -> tensor, of all files in the folder."""
        return _stored(self.folder)

    def dtype(self, name: str) -> str:
        """The safetensors name of the dtype that stores canonical tensor `name`; of one in MXFP4, bf16."""
        return self._stacked[name].dtype if name in self._stacked else self._place(name)[0].dtype

    def read(self, name: str, index: Index) -> np.ndarray:
        """Raw bits (uint16, uint32, uint64) of the outer product of sorted indices, as a new array.

        Only the rows in `index[0]` are read; the other dimensions are picked from them in memory.
        Raises InputError if the file has become shorter since it was opened.
        """
        if name in self._stacked:
            return self._stacked[name].read(index)
        entry, first = self._place(name)
        rows, *rest = index
        row = entry.shape[1:]
        block: np.ndarray
        if not row:  # a vector: single elements are too small to be read one by one
            block = read_rows(entry, np.arange(first, first + self._shapes[name][0]), row)[rows]
        else:
            block = read_rows(entry, rows + first, row)
        for dim, kept in enumerate(rest, start=1):
            block = _picked(block, dim, kept)
        return block

    def stream(self, name: str, index: Index, sink: Sink) -> None:
        """Writes the outer product of sorted indices into `sink`.

        Long runs of complete rows are copied directly; anything else is read in blocks of rows, picked from, and
        written. Raises what `read` and `Sink` raise."""
        if name in self._stacked:  # a stack of experts is read whole for each of them
            sink.write(self.read(name, index))
            return
        entry, first = self._place(name)
        rows, *rest = index
        step = math.prod(entry.shape[1:]) * SIZES[entry.dtype]
        whole_rows = all(len(kept) == size for kept, size in zip(rest, entry.shape[1:], strict=True))
        if whole_rows and len(runs := runs_of(rows)) * LEAST <= max(LEAST, len(rows) * step):
            check_range(rows + first, entry.shape[0])
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
        places: dict[str, tuple[Entry, int]] = {}
        claimed: set[str] = set()
        find = functools.partial(_checked, self.folder, stored)
        for name, parts in self.family.hf_tensors(self.architecture).items():
            shape = self.family.stored_shape(name, [self._shapes[part] for part in parts])
            if turns := self.family.turns(name):
                found, names = stacks.claimed(name, parts, turns, self.family.packed(self.config), find, shape)
                self._stacked |= found
                claimed |= names
                continue
            entry, first = find(name, shape), 0
            claimed.add(name)
            for part in parts:
                places[part] = (entry, first)
                first += self._shapes[part][0]
        self._refuse_unclaimed(stored.keys() - claimed)
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


def _checked(
    folder: Path, stored: dict[str, Entry], name: str, shape: tuple[int, ...], dtypes: tuple[str, ...] = ()
) -> Entry:
    if name not in stored:
        raise InputError(f"'{folder}' lacks the tensor '{name}' that its config needs")
    entry, legal = stored[name], dtypes or tuple(RAW)
    if entry.shape != shape:
        raise InputError(f"'{name}' in '{folder}' is {entry.shape}; its config says {shape}")
    if entry.dtype not in legal:
        raise InputError(f"'{name}' in '{folder}' is stored as {entry.dtype}; legal are {', '.join(legal)}")
    return entry


def _picked(block: np.ndarray, dim: int, kept: np.ndarray) -> np.ndarray:
    """The positions `kept` (sorted) of one dimension, picked by the cheapest way that numpy has."""
    if len(kept) == block.shape[dim]:
        return block
    check_range(kept, block.shape[dim])
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
