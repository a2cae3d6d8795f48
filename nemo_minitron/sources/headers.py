"""Reads the header of a safetensors file without trusting it; a refusal is one sentence about what is wrong."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from nemo_minitron.artifacts.files import read_json
from nemo_minitron.artifacts.json_types import Json, JsonObject
from nemo_minitron.errors import InputError

LARGEST = 100_000_000  # bytes of a header, the limit of the format
SIZES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
"""Bytes of an element, by the format's name of the dtype."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One stored tensor; `start` is the absolute position of its first byte in `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        return math.prod(self.shape) * SIZES[self.dtype]


def read_header(file: Path) -> dict[str, Entry]:
    """Tensor name -> Entry, in the order of the file. It reads the header but no weights.

    Raises InputError if the file is incomplete or breaks a rule of the format.
    """
    values, start, end = _parse(file)
    values.pop("__metadata__", None)
    entries = {}
    for name, fields in values.items():
        entries[name] = _entry(file, name, fields, start)
    position = start
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].size)))
    for name, entry in ordered.items():
        if entry.start != position:
            how = "overlaps" if entry.start < position else "leaves a hole after"
            _refuse(file, f"'{name}' {how} the tensor before it")
        position += entry.size
    if position != end:
        _refuse(file, f"its header describes {position} bytes, the file has {end}; is the download complete?")
    return ordered


def _parse(file: Path) -> tuple[JsonObject, int, int]:
    """The header's JSON object, the position after it, and the file's size."""
    try:
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, LARGEST):
                _refuse(file, f"its header should take {length} bytes and the file has {size}")
            text = stream.read(length)
    except OSError as error:
        raise InputError(f"'{file}' cannot be read ({error.strerror})") from None
    try:
        values = json.loads(text, object_pairs_hook=_unique)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        _refuse(file, f"its header is not JSON ({error})")
    if not isinstance(values, dict):
        _refuse(file, "its header is not a JSON object")
    return values, 8 + length, size


def _unique(pairs: list[tuple[str, Json]]) -> JsonObject:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name occurs twice")
    return values


def _entry(file: Path, name: str, fields: Json, start: int) -> Entry:
    if not isinstance(fields, dict):
        _refuse(file, f"'{name}' has no dtype, shape and offsets")
    dtype: Json = fields.get("dtype")
    shape: Json = fields.get("shape")
    offsets: Json = fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in SIZES:
        _refuse(file, f"'{name}' has the unknown dtype {dtype!r}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        _refuse(file, f"'{name}' has an illegal shape or illegal offsets")
    entry = Entry(file, dtype, tuple(shape), start + offsets[0])
    if entry.size != offsets[1] - offsets[0]:
        _refuse(file, f"'{name}' is {entry.shape} {dtype} but takes {offsets[1] - offsets[0]} bytes")
    return entry


def _naturals(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _refuse(file: Path, why: str) -> NoReturn:
    raise InputError(f"'{file}' is not a complete safetensors file: {why}")


def shards(folder: Path) -> Iterator[tuple[Path, set[str]]]:
    """The safetensors files of a Hugging Face folder, each with the tensor names that the index puts there.

    A single `model.safetensors` comes first, as in transformers, and has no such names.

    Raises InputError if the folder has no safetensors, or its index is damaged or points out of the folder.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        yield single, set()
        return
    if not index.is_file():
        _no_weights(folder)
    for name, tensors in _weight_map(index).items():
        if not (folder / name).is_file():
            raise InputError(f"'{folder}' lacks the shard '{name}' of its index; is the download complete?")
        yield folder / name, tensors


def _weight_map(index: Path) -> dict[str, set[str]]:
    values = read_json(index, "the index")
    weights = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(weights, dict) or not weights:
        raise InputError(f"the index '{index}' has no weight_map")
    files: dict[str, set[str]] = {}
    for tensor, name in weights.items():
        if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in "/\\\0"):
            raise InputError(f"the index '{index}' puts '{tensor}' into {name!r}, which is no file beside it")
        files.setdefault(name, set()).add(tensor)
    return files


def _no_weights(folder: Path) -> NoReturn:
    pickles = sorted(p.name for end in ("*.bin", "*.pt", "*.pth") for p in folder.glob(end))
    if pickles:
        raise InputError(
            f"'{folder}' has its weights only as a pickle ('{pickles[0]}'), which can run code when it is "
            "loaded; save it as safetensors first (save_pretrained of transformers does)"
        )
    raise InputError(f"'{folder}' has neither model.safetensors nor model.safetensors.index.json")
