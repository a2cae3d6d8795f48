"""Reads the files of a torch_dist checkpoint without trusting them: where each chunk lies, and one chunk at a time.

`.metadata` is a pickle. It is read through an allow-list of classes that only hold values; its content is then checked
against the files that it names. Chunks are read with torch's weights-only loader, after a check of the size that they
unpack to. `check_resumable` checks in this way every file that Megatron unpickles when a training is resumed.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from nemo_minitron.errors import InputError, first_line

if TYPE_CHECKING:
    from torch.distributed.checkpoint.filesystem import _StorageInfo

SLACK = 1 << 20  # bytes that a chunk may take beside its numbers

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
    """Stands in for objects that a checkpoint keeps only for its next save; takes any arguments and ignores them."""

    def __init__(self, *arguments: object) -> None: ...


_STAND_INS = {  # stand-ins; they also save the import of Megatron
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"): Metadata,
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"): _Unread,
    ("torch.distributed.checkpoint.planner", "SavePlan"): _Unread,
    ("torch.distributed.checkpoint.planner", "TensorWriteData"): _Unread,
    ("torch.distributed.checkpoint.planner", "WriteItem"): _Unread,
    ("torch.distributed.checkpoint.planner", "WriteItemType"): _Unread,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if (module, name) in _STAND_INS:
            return _STAND_INS[module, name]
        if (module, name) in _ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")


class Place(NamedTuple):
    """The place of a chunk's bytes."""

    file: Path
    offset: int
    length: int


def read_metadata(weights: Path) -> Metadata:
    """torch's Metadata of a torch_dist folder; types are checked, and counts are checked against the files' sizes.

    Nothing that the file names is run. Raises InputError if the file is missing, damaged or hostile.
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
                raise ValueError("the name of a tensor is not a text")
            if not isinstance(entry, BytesStorageMetadata):
                _check_entry(key, entry, metadata.storage_data, weights, sizes)
        return metadata
    except Exception as error:  # a hostile or damaged pickle can raise anything
        raise InputError(f"'{file}' was refused: {first_line(error)}") from None


def _check_entry(
    key: str,
    entry: TensorStorageMetadata,
    storage: Mapping[MetadataIndex, _StorageInfo],
    weights: Path,
    files: dict[str, tuple[Path, int]],
) -> None:
    """Raises ValueError if a chunk of a tensor lies outside the tensor, or has more numbers than bytes."""
    dtype, size = entry.properties.dtype, tuple(entry.size)
    if not isinstance(dtype, torch.dtype) or not _naturals(size) or len(size) > 8:
        raise ValueError(f"'{key}' has no dtype and size")
    for chunk in entry.chunks:
        offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
        inside = _naturals(offsets) and _naturals(sizes) and len(offsets) == len(sizes) == len(size)
        if not inside or any(a + n > extent for a, n, extent in zip(offsets, sizes, size, strict=True)):
            raise ValueError(f"a chunk of '{key}' lies outside it")
        info = storage.get(MetadataIndex(key, chunk.offsets))
        if info is None:
            raise ValueError(f"it does not say where a chunk of '{key}' lies")
        place = place_of(weights, info, files)
        if math.prod(sizes) * dtype.itemsize > place.length:
            raise ValueError(f"a chunk of '{key}' has {math.prod(sizes)} numbers in {place.length} bytes")


def _naturals(values: tuple[object, ...]) -> bool:
    return all(type(value) is int and 0 <= value < 2**62 for value in values)


def place_of(weights: Path, info: _StorageInfo, files: dict[str, tuple[Path, int]] | None = None) -> Place:
    """The place of a chunk. `files`: a cache, name -> (file, size), of the files that were checked before.

    Raises InputError if the bytes are not in the folder's files, or were transformed (compressed)."""
    name, known = str(info.relative_path), {} if files is None else files
    if name not in known:
        file = (weights / name).resolve()
        if weights.resolve() not in file.parents:
            raise InputError(f"the checkpoint '{weights.parent}' points outside its own folder, to '{name}'")
        known[name] = file, file.stat().st_size if file.is_file() else 0
    file, file_size = known[name]
    if getattr(info, "transform_descriptors", None):
        raise InputError(f"'{file}' holds compressed chunks; save it without compression")
    if not _naturals((info.offset, info.length)) or info.offset + info.length > file_size:
        raise InputError(f"the checkpoint '{weights.parent}' names bytes that '{file.name}' does not have")
    return Place(file, info.offset, info.length)


def load_chunk(place: Place, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A chunk's tensor. Raises InputError if the bytes are no tensor, or of another dtype or size than `.metadata`
    says."""
    tensor = _load(place, math.prod(shape) * dtype.itemsize)
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
        raise InputError(f"a chunk of '{place.file}' is not a plain tensor")
    if tensor.dtype != dtype or tensor.numel() != math.prod(shape):
        raise InputError(
            f"a chunk of '{place.file}' has {tensor.numel()} numbers of {tensor.dtype}; its .metadata says "
            f"{math.prod(shape)} of {dtype}"
        )
    return tensor.detach().reshape(shape)


def _load(place: Place, size: int) -> object:
    """The result of torch's weights-only loader; the bytes may unpack to about `size` bytes, not more."""
    try:
        with open(place.file, "rb") as stream:
            stream.seek(place.offset)
            data = stream.read(place.length)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            inflated = sum(entry.file_size for entry in archive.infolist())
        if inflated > size + SLACK:
            raise ValueError(f"it would take {inflated} bytes in the place of {size}")
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds of errors for damaged bytes
        raise InputError(
            f"a chunk of '{place.file}' cannot be read: {type(error).__name__}: {first_line(error)}"
        ) from None


# -- a resumed training ---------------------------------------------------------------------------
def check_resumable(folder: Path) -> None:
    """Raises InputError if a pickle of a training's checkpoint in `folder` holds more than values.

    The pickles are `.metadata`, `common.pt`, Bridge's records and the objects among the chunks; Megatron and torch
    would load them with pickle's own loader, which runs what they name."""
    for file in sorted(folder.glob("*.pt")):
        _load(Place(file, 0, file.stat().st_size), file.stat().st_size)
    found = [*folder.glob("*/weights/.metadata"), *folder.glob("*/.metadata")]  # NeMo's, Bridge's
    for weights in sorted(path.parent for path in found):
        metadata = read_metadata(weights)
        for index, info in metadata.storage_data.items():
            if not hasattr(metadata.state_dict_metadata.get(index.fqn), "chunks"):  # an object, not a tensor
                place = place_of(weights, info)
                _load(place, place.length)
        for file in sorted(weights.glob("*.pt")):
            _load(Place(file, 0, file.stat().st_size), file.stat().st_size)
