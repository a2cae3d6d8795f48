"""A NeMo checkpoint (torch_dist weights beside a context) as a TensorSource, read chunk by chunk.

Neither part is trusted: `.metadata` is a pickle, read through an allow-list of classes; the context's
`io.json` names classes that NeMo would import and call, here it is read as data. Chunks are read one at a
time with torch's weights-only loader.
"""

from __future__ import annotations

import io
import itertools
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts.digest import Index
from nemo_minitron.artifacts.records import read_last
from nemo_minitron.errors import InputError
from nemo_minitron.families import from_hf
from nemo_minitron.nemo.bits import DTYPES, as_raw
from nemo_minitron.nemo.context import hf_config, tokenizer_folder
from nemo_minitron.nemo.mapping import Piece, pieces
from nemo_minitron.pruning.tensors import RAW

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


_LAYER = re.compile(r"decoder\.layers\.(?:(\d+)\.)?(.+)")
_EXPERTS = re.compile(r"mlp\.experts\.experts\.(.+)")


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


def read_metadata(weights: Path) -> Any:
    """torch's Metadata of a torch_dist folder. Raises InputError; runs nothing that the file names."""
    file = weights / ".metadata"
    if not file.is_file():
        raise InputError(f"'{weights}' has no .metadata, so it holds no torch_dist checkpoint")
    try:
        metadata = _Unpickler(io.BytesIO(file.read_bytes())).load()
        if not (metadata.state_dict_metadata and metadata.storage_data):
            raise pickle.UnpicklingError("it lists no tensors")
        return metadata
    except Exception as error:  # a hostile or damaged pickle can raise anything
        raise InputError(f"'{file}' was refused: {error}") from None


class CheckpointSource:
    """A NeMo checkpoint's canonical tensors. `config`: its Hugging Face config; `folder`: its tokenizer's.

    Holds one chunk (one layer's piece of one tensor, as it was saved) in memory at a time.
    Raises InputError for what is damaged, hostile or not a model of a supported family.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.folder = tokenizer_folder(self.path)
        self.config = hf_config(self.path)
        self._weights = self.path / "weights"
        self._metadata = read_metadata(self._weights)
        if self.config["vocab_size"] is None:  # NeMo took it from the tokenizer and padded it
            embedding = self._metadata.state_dict_metadata.get("module.embedding.word_embeddings.weight")
            self.config["vocab_size"] = embedding.size[0] if embedding else None
        self.architecture = from_hf(self.config)
        self._chunks: dict[tuple[str, tuple[int, ...]], list[Any]] = {}
        self._places = self._locate()
        self._chunk: tuple[Any, torch.Tensor] | None = None

    def dtype(self, name: str) -> str:
        key, _, _ = self._places[name][0]
        return DTYPES[self._metadata.state_dict_metadata[key].properties.dtype]

    def _locate(self) -> dict[str, list[tuple[str, tuple[int, ...], Piece]]]:
        """Canonical name -> (key in the checkpoint, layer and expert where they are stacked, piece of the tensor)."""
        found: dict[str, list[tuple[str, tuple[int, ...], Piece]]] = {}
        for key, entry in self._metadata.state_dict_metadata.items():
            if not key.startswith("module.") or not hasattr(entry, "size"):
                continue
            stacked = 0
            for name, at in _parameters(key.removeprefix("module."), entry.size, self.architecture):
                stacked = len(at)
                for piece in pieces(name, self.architecture):
                    found.setdefault(piece.tensor, []).append((key, at, piece))
            for chunk in entry.chunks:
                for at in _stacked_in(chunk, stacked):
                    self._chunks.setdefault((key, at), []).append(chunk)
        shapes = self.architecture.shapes()
        if missing := shapes.keys() - found.keys():
            raise InputError(f"the checkpoint '{self.path}' lacks the tensor '{min(missing)}'")
        if surplus := found.keys() - shapes.keys():
            raise InputError(f"the checkpoint '{self.path}' has '{min(surplus)}', which its config does not speak of")
        return found

    def read(self, name: str, index: Index) -> np.ndarray:
        """Raw bits of the outer product of sorted indices, one array per dimension."""
        block = np.empty([len(i) for i in index], RAW[self.dtype(name)])
        for key, at, piece in self._places[name]:
            inside = [np.nonzero((i >= a) & (i < b))[0] for i, (a, b) in zip(index, piece.box, strict=True)]
            if all(map(len, inside)):
                wanted = [
                    i[here] - box[0] + place[0]
                    for i, here, box, place in zip(index, inside, piece.box, piece.place, strict=True)
                ]
                block[np.ix_(*inside)] = self._block(key, at, wanted)
        return block

    def _block(self, key: str, stacked: tuple[int, ...], wanted: list[np.ndarray]) -> np.ndarray:
        """Elements of one saved tensor, of a layer (and expert) where they are stacked, from the chunks that
        hold them."""
        entry = self._metadata.state_dict_metadata[key]
        full = [*(np.array([number]) for number in stacked), *wanted]
        block = np.zeros([len(i) for i in full], RAW[DTYPES[entry.properties.dtype]])
        missing = block.size
        for chunk in self._chunks.get((key, stacked), ()):
            first = np.array(chunk.offsets)
            last = first + np.array(chunk.sizes)
            inside = [np.nonzero((i >= a) & (i < b))[0] for i, a, b in zip(full, first, last, strict=True)]
            if all(len(at) for at in inside):
                data = as_raw(self._read_chunk(key, chunk)).reshape(tuple(chunk.sizes))
                local = [i[at] - a for i, at, a in zip(full, inside, first, strict=True)]
                block[np.ix_(*inside)] = data[np.ix_(*local)]
                missing -= data[np.ix_(*local)].size
        if missing:
            raise InputError(f"the checkpoint '{self.path}' lacks {missing} elements of '{key}'")
        return block.reshape(block.shape[len(stacked) :])

    def _read_chunk(self, key: str, chunk: Any) -> torch.Tensor:
        where = MetadataIndex(key, chunk.offsets)
        if self._chunk is None or self._chunk[0] != where:
            info = self._metadata.storage_data.get(where)
            if info is None:
                raise InputError(f"the checkpoint '{self.path}' does not say where a chunk of '{key}' lies")
            file = (self._weights / info.relative_path).resolve()
            if self._weights.resolve() not in file.parents:
                raise InputError(f"the checkpoint '{self.path}' points outside of itself, to '{info.relative_path}'")
            self._chunk = (where, _load(file, info.offset, info.length, tuple(chunk.sizes)))
        return self._chunk[1]


def _load(file: Path, offset: int, length: int, shape: tuple[int, ...]) -> torch.Tensor:
    try:
        with open(file, "rb") as stream:
            stream.seek(offset)
            tensor = torch.load(io.BytesIO(stream.read(length)), map_location="cpu", weights_only=True)
        return tensor.detach().reshape(shape)
    except Exception as error:  # torch raises many kinds for damaged bytes
        raise InputError(f"a chunk of '{file}' cannot be read: {type(error).__name__}: {error}") from None


def _stacked_in(chunk: Any, dimensions: int) -> Iterator[tuple[int, ...]]:
    """The positions along the stacked dimensions that lie in a chunk."""
    bounds = itertools.islice(zip(chunk.offsets, chunk.sizes, strict=True), dimensions)
    return itertools.product(*(range(first, first + size) for first, size in bounds))


def _parameters(name: str, size: Any, a: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    """A checkpoint's key -> Megatron parameters, and where each lies in the saved tensor's first dimensions.

    Layers are stacked along the first dimension, or each has a key; experts are stacked along the next one.
    """
    found = _LAYER.fullmatch(name)
    if not found:
        yield name, ()
        return
    layer, local = found.groups()
    experts = _EXPERTS.fullmatch(local)
    counts = [(a.num_layers, "layers")] if layer is None else []
    counts += [(a.num_moe_experts or 0, "experts")] if experts else []
    for (count, what), stacked in zip(counts, size, strict=False):
        if count != stacked:
            raise InputError(f"'{name}' is stacked for {stacked} {what}, the checkpoint's config has {count}")
    for at in itertools.product(*(range(count) for count, _ in counts)):
        number = at[0] if layer is None else layer
        tail = f"mlp.experts.local_experts.{at[-1]}.{experts[1]}" if experts else local
        yield f"decoder.layers.{number}.{tail}", at


def last_checkpoint(folder: Path) -> Path:
    """Where `distill` left its last checkpoint. Raises InputError where there is none."""
    return folder / read_last(folder / "last.json")["checkpoint"]
