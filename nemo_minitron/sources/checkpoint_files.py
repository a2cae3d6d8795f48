"""The files of a torch_dist checkpoint, distrusted: what lies where, and one chunk after the other.

`.metadata` is a pickle, read through an allow-list of classes that do nothing but hold values; what it says is then
checked against the files that it speaks of. Chunks are read with torch's weights-only loader, after a look at how large
they become. `check_resumable` looks in this way at all that Megatron unpickles when a training goes on.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from nemo_minitron.errors import InputError, first_line

SLACK = 1 << 20  # bytes of a chunk beside its numbers

_ALLOWED = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib", "Path"),
}  # fmt: skip


class _Unread:
    """Stands for what a checkpoint keeps for its own next save; takes any arguments and means nothing."""

    def __init__(self, *arguments: Any) -> None: ...


_STAND_INS = {  # also so that reading a checkpoint does not import Megatron
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"): Metadata,
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"): _Unread,
    ("torch.distributed.checkpoint.planner", "TensorWriteData"): _Unread,
    ("torch.distributed.checkpoint.planner", "WriteItem"): _Unread,
    ("torch.distributed.checkpoint.planner", "WriteItemType"): _Unread,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _STAND_INS:
            return _STAND_INS[module, name]
        if (module, name) in _ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")


class Place(NamedTuple):
    """Where a chunk's bytes lie."""

    file: Path
    offset: int
    length: int


def read_metadata(weights: Path) -> Any:
    """torch's Metadata of a torch_dist folder, each value of its type and each count one that the files can hold.

    Raises InputError; runs nothing that the file names.
    """
    file = weights / ".metadata"
    if not file.is_file():
        raise InputError(f"'{weights}' has no .metadata, so it holds no torch_dist checkpoint")
    try:
        metadata = _Unpickler(io.BytesIO(file.read_bytes())).load()
        if not (metadata.state_dict_metadata and metadata.storage_data):
            raise pickle.UnpicklingError("it lists no tensors")
        sizes: dict[str, tuple[Path, int]] = {}
        for key, entry in metadata.state_dict_metadata.items():
            if not isinstance(key, str) or not key.isprintable():
                raise ValueError("a tensor's name is no text")
            if not isinstance(entry, BytesStorageMetadata):
                _check_entry(key, entry, metadata.storage_data, weights, sizes)
        return metadata
    except Exception as error:  # a hostile or damaged pickle can raise anything
        raise InputError(f"'{file}' was refused: {first_line(error)}") from None


def _check_entry(key: str, entry: Any, storage: Any, weights: Path, files: dict[str, tuple[Path, int]]) -> None:
    """Raises ValueError for a tensor whose chunks do not lie in it, or have more numbers than bytes."""
    dtype, size = entry.properties.dtype, tuple(entry.size)
    if not isinstance(dtype, torch.dtype) or not _naturals(size) or len(size) > 8:
        raise ValueError(f"'{key}' has no dtype and size")
    for chunk in entry.chunks:
        offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
        inside = _naturals(offsets) and _naturals(sizes) and len(offsets) == len(sizes) == len(size)
        if not inside or any(a + n > whole for a, n, whole in zip(offsets, sizes, size, strict=True)):
            raise ValueError(f"a chunk of '{key}' lies outside of it")
        info = storage.get(MetadataIndex(key, chunk.offsets))
        if info is None:
            raise ValueError(f"it does not say where a chunk of '{key}' lies")
        place = place_of(weights, info, files)
        if math.prod(sizes) * dtype.itemsize > place.length:
            raise ValueError(f"a chunk of '{key}' has {math.prod(sizes)} numbers in {place.length} bytes")


def _naturals(values: tuple[Any, ...]) -> bool:
    return all(type(value) is int and 0 <= value < 2**62 for value in values)


def place_of(weights: Path, info: Any, files: dict[str, tuple[Path, int]] | None = None) -> Place:
    """Raises InputError for bytes that are not in the folder's files, and for bytes that were transformed. `files`:
    those that were looked at before, with their sizes."""
    name, known = str(info.relative_path), {} if files is None else files
    if name not in known:
        file = (weights / name).resolve()
        if weights.resolve() not in file.parents:
            raise InputError(f"the checkpoint '{weights.parent}' points outside of itself, to '{name}'")
        known[name] = file, file.stat().st_size if file.is_file() else 0
    file, there = known[name]
    if getattr(info, "transform_descriptors", None):
        raise InputError(f"'{file}' holds chunks that are compressed as a whole; save it without")
    if not _naturals((info.offset, info.length)) or info.offset + info.length > there:
        raise InputError(f"the checkpoint '{weights.parent}' speaks of bytes that '{file.name}' does not have")
    return Place(file, info.offset, info.length)


def load_chunk(place: Place, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A chunk's numbers. Raises InputError for bytes that are none, or of another dtype or number than said."""
    tensor = _load(place, math.prod(shape) * dtype.itemsize)
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
        raise InputError(f"a chunk of '{place.file}' is no plain tensor")
    if tensor.dtype != dtype or tensor.numel() != math.prod(shape):
        raise InputError(
            f"a chunk of '{place.file}' has {tensor.numel()} numbers of {tensor.dtype}; its .metadata says "
            f"{math.prod(shape)} of {dtype}"
        )
    return tensor.detach().reshape(shape)


def _load(place: Place, size: int) -> Any:
    """What torch's weights-only loader makes of the bytes, which may become `size` bytes and not many more."""
    try:
        with open(place.file, "rb") as stream:
            stream.seek(place.offset)
            data = stream.read(place.length)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            inflated = sum(entry.file_size for entry in archive.infolist())
        if inflated > size + SLACK:
            raise ValueError(f"it would take {inflated} bytes in the place of {size}")
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for damaged bytes
        raise InputError(
            f"a chunk of '{place.file}' cannot be read: {type(error).__name__}: {first_line(error)}"
        ) from None


# -- a training that goes on ---------------------------------------------------------------------------
def check_resumable(folder: Path) -> None:
    """Raises InputError for a training's checkpoint in `folder` whose pickles ask for more than values: `.metadata`,
    `common.pt`, and the objects among the chunks. Megatron and torch read them with pickle's own loader."""
    for weights in sorted(path.parent for path in folder.glob("*/weights/.metadata")):
        metadata = read_metadata(weights)
        for index, info in metadata.storage_data.items():
            if not hasattr(metadata.state_dict_metadata.get(index.fqn), "chunks"):  # an object, no tensor
                place = place_of(weights, info)
                _load(place, place.length)
        for file in sorted(weights.glob("*.pt")):
            _load(Place(file, 0, file.stat().st_size), file.stat().st_size)
