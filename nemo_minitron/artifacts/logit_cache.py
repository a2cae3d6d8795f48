"""A teacher's logits on disk: a folder of shards of rows; a row is found by its tokens.

`cache.json` says which model and text the numbers belong to; it is written first. `shard-00000.logits` and the
following files hold `rows_per_shard` rows each; a shard is complete or absent. A shard has, little-endian: uint64 the
number of rows, uint64 [rows] keys, uint64 [rows, sets] ends of the records, then the records (`Codec`). Nothing in a
cache depends on the layout that made it or reads it, or on the order in which rows are read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from nemo_minitron.artifacts.cache_settings import CacheSettings
from nemo_minitron.artifacts.files import atomic_file, digest_of, read_json, write_json
from nemo_minitron.artifacts.logit_records import Codec, Kept
from nemo_minitron.artifacts.parse import anything, checked, flag, grouped, mapped, number, text, whole
from nemo_minitron.errors import InputError

VERSION = 1
HEADER = "cache.json"
SAMPLED_ROWS = 64
MOST_SHARDS = 10_000_000  # a list of all their names must fit into memory
_SETTINGS = {"int": whole(), "float": number(), "str": text(), "bool": flag}
SETTINGS = grouped({}, {field.name: _SETTINGS[str(field.type)] for field in dataclasses.fields(CacheSettings)})
KIND = grouped({
    "version": whole(), "digest": text(), "settings": SETTINGS, "model": text(), "data": text(),
    "vocab_size": whole(1, 2**31 - 1), "rows": whole(1), "rows_per_shard": whole(1, 2**31 - 1),
})  # fmt: skip


def row_key(tokens: np.ndarray) -> int:
    """64 bits of blake2b over a row's tokens: the key of the row in a cache."""
    raw = np.ascontiguousarray(tokens, "<i4").tobytes()
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")


def data_digest(row: Callable[[int], np.ndarray], rows: int, sequence_length: int) -> str:
    """Digest of the first `rows` rows of a text: of their number, their length, and the keys of up to 64 of them."""
    places = np.unique(np.linspace(0, rows - 1, min(rows, SAMPLED_ROWS)).astype(int))
    return digest_of([rows, sequence_length, [row_key(row(int(i))) for i in places]])


@dataclasses.dataclass(frozen=True)
class CacheHeader:
    """`cache.json`. `model`: digest of the teacher's weights and config; `data`: `data_digest` of its rows."""

    settings: CacheSettings
    model: str
    data: str
    vocab_size: int
    rows: int
    rows_per_shard: int = 256

    @property
    def digest(self) -> str:
        """Digest of what decides the numbers: model, text, mode, draws, both temperatures, seed; not the sharding."""
        return digest_of([self.settings.identity(), self.model, self.data, self.vocab_size, self.rows])

    @property
    def shards(self) -> int:
        return -(-self.rows // self.rows_per_shard)

    def rows_of(self, shard: int) -> range:
        return range(shard * self.rows_per_shard, min(self.rows, (shard + 1) * self.rows_per_shard))

    def save(self, folder: str | Path) -> None:
        write_json(Path(folder) / HEADER, {"version": VERSION, "digest": self.digest, **dataclasses.asdict(self)})

    @classmethod
    def load(cls, folder: str | Path) -> CacheHeader:
        """Reads `cache.json`. Raises InputError if the folder holds no cache of this version."""
        values = read_json(Path(folder) / HEADER, "the header of the logit cache", mapped(anything(4)))
        if values.get("version") != VERSION:
            raise InputError(f"'{folder}' is no logit cache of version {VERSION}")
        values = checked(values, KIND, f"the header of the logit cache '{folder}'")
        del values["version"]
        try:
            stored, settings = values.pop("digest"), CacheSettings(**values.pop("settings"))
            header = cls(settings=settings, **values)
        except TypeError as error:  # an unknown name of a setting
            raise InputError(f"'{folder}' holds no logit cache ({type(error).__name__}: {error})") from None
        if header.shards > MOST_SHARDS:
            raise InputError(f"the logit cache '{folder}' has {header.shards} shards; legal are 1 to {MOST_SHARDS}")
        if stored != header.digest:
            raise InputError(
                f"'{Path(folder) / HEADER}' was changed by hand: its digest is wrong; run minitron cache-logits again"
            )
        return header

    def check(self, folder: str | Path, **expected: object) -> None:
        """Raises InputError if `model`, `data`, `vocab_size`, `rows` or a setting differs from the expected value."""
        have = dataclasses.asdict(self.settings) | {"vocab_size": self.vocab_size, "rows": self.rows}
        for name, value in expected.items():
            if name in ("model", "data"):
                what = {"model": "another teacher (or its config)", "data": "other text"}[name]
                if getattr(self, name) != value:
                    raise InputError(f"the logit cache '{folder}' is of {what}; make one with minitron cache-logits")
            elif have[name] != value:
                raise InputError(f"the logit cache '{folder}' has {name} {have[name]}, not {value}; they must agree")


def shard_path(folder: str | Path, shard: int) -> Path:
    return Path(folder) / f"shard-{shard:05d}.logits"


def missing(folder: str | Path, header: CacheHeader) -> list[int]:
    """The numbers of the shards that are absent."""
    return [shard for shard in range(header.shards) if not shard_path(folder, shard).is_file()]


def torn(folder: str | Path, header: CacheHeader) -> list[Path]:
    """The shards that are present but are not as long as their header says."""
    sets = header.settings.stored_sets
    present = [path for shard in range(header.shards) if (path := shard_path(folder, shard)).is_file()]
    return [path for path in present if _numbers(path, _rows(path), sets) is None]


def _rows(path: Path) -> int:
    with open(path, "rb") as file:
        return int.from_bytes(file.read(8), "little")


def _numbers(path: Path, rows: int, sets: int) -> tuple[np.ndarray, np.ndarray] | None:
    """The keys of a shard's rows and the ends of its records; None if it is torn or has another number of rows."""
    size, file_size = 8 * (1 + rows + rows * sets), path.stat().st_size
    if file_size < size or _rows(path) != rows:
        return None
    with open(path, "rb") as file:
        numbers = np.frombuffer(file.read(size), "<u8")
    ends = numbers[rows + 1 :]
    torn = file_size != size + int(numbers[-1]) or (ends[1:] < ends[:-1]).any()
    return None if torn else (numbers[1 : rows + 1], ends)


def write_shard(path: Path, keys: Sequence[int], records: Sequence[Sequence[bytes]]) -> None:
    """Writes a shard atomically; `records[row][set]` are in the order of `keys`."""
    ends = np.cumsum([len(record) for row in records for record in row], dtype=np.uint64)
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        for part in (np.array([len(keys)]), np.array(keys, np.uint64), ends):
            file.write(part.astype("<u8").tobytes())
        for row in records:
            file.writelines(row)


class LogitCache:
    """A finished cache, read row by row. It keeps 8 bytes a row and 8 bytes a record in memory.

    Raises InputError if the cache is not finished, or is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder, self.header = Path(folder), CacheHeader.load(folder)
        if absent := missing(folder, self.header):
            done = self.header.shards - len(absent)
            raise InputError(
                f"the logit cache '{folder}' has {done} of its {self.header.shards} shards; run the same minitron "
                "cache-logits again, and it goes on"
            )
        self._codec = Codec(self.header.settings, self.header.vocab_size)
        index = [self._index(shard) for shard in range(self.header.shards)]
        keys = np.concatenate([keys for keys, _ in index])
        self._ends = [ends for _, ends in index]
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]

    def find(self, tokens: np.ndarray) -> int:
        """The number of the row with these tokens, int [sequence_length]. Raises InputError if the cache lacks it."""
        key = np.uint64(row_key(tokens))
        place = int(np.searchsorted(self._keys, key))
        if place == len(self._keys) or self._keys[place] != key:
            raise InputError(
                f"the logit cache '{self.folder}' lacks a row of {len(tokens)} tokens that training uses; it has "
                f"the first {self.header.rows} rows of {self.header.settings.sequence_length} of its text"
            )
        return int(self._order[place])

    def read(self, row: int, epoch: int = 0) -> Kept:
        """The kept tokens of a row's positions, in the set that belongs to an epoch."""
        shard, place = divmod(row, self.header.rows_per_shard)
        ends = self._ends[shard]
        sets = self.header.settings.stored_sets
        record = place * sets + epoch % sets
        start = int(ends[record - 1]) if record else 0
        base = 8 + 8 * (len(ends) // sets) + 8 * len(ends)
        file = os.open(shard_path(self.folder, shard), os.O_RDONLY)
        try:
            return self._codec.decode(os.pread(file, int(ends[record]) - start, base + start))
        finally:
            os.close(file)

    def _index(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        path = shard_path(self.folder, shard)
        keys_and_ends = _numbers(path, len(self.header.rows_of(shard)), self.header.settings.stored_sets)
        if keys_and_ends is None:
            raise InputError(f"'{path}' is damaged; run the same minitron cache-logits again")
        return keys_and_ends
