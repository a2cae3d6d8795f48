"""A checkpoint of NeMo or Megatron-Bridge (torch_dist weights beside a config) as a TensorSource, read chunk by chunk.

Neither part is trusted. `checkpoint_files.py` checks `.metadata` and the chunks; NeMo's `io.json` and Bridge's
`run_config.yaml` name classes that the frameworks would import and call, but here they are read as data. Chunks are
read one at a time.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts.digest import Index
from nemo_minitron.artifacts.records import read_last
from nemo_minitron.artifacts.run_folder import TrainingFolder
from nemo_minitron.errors import InputError
from nemo_minitron.families import from_hf
from nemo_minitron.sources import bridge_config
from nemo_minitron.sources.bits import DTYPES, as_raw
from nemo_minitron.sources.bridge_config import is_bridge_checkpoint, newest
from nemo_minitron.sources.checkpoint_files import load_chunk, place_of, read_metadata
from nemo_minitron.sources.context import hf_config, tokenizer_folder
from nemo_minitron.sources.mapping import Piece, pieces
from nemo_minitron.sources.tensors import RAW, ModelSource

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

_LAYER = re.compile(r"decoder\.layers\.(?:(\d+)\.)?(.+)")
OTHERS = ("optimizer.", "chained_", "rng_state", "rerun_state", "common_state")  # what Bridge saves beside the model
_EXPERTS = re.compile(r"mlp\.experts\.experts\.(.+)")


class CheckpointSource(ModelSource):
    """A checkpoint's canonical tensors. `config`: its Hugging Face config; `folder`: the folder of its tokenizer. A
    folder of Bridge's checkpoints is the newest of them.

    It holds one chunk (one layer's piece of one tensor, as it was saved) in memory at a time.
    Raises InputError if the checkpoint is damaged, hostile or not a model of a supported family.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if is_bridge_checkpoint(self.path):
            self.path = self._weights = newest(self.path)
            self.folder, self.config, self._prefix = self.path / "tokenizer", bridge_config.hf_config(self.path), ""
        else:
            self._weights, self._prefix = self.path / "weights", "module."
            self.folder, self.config = tokenizer_folder(self.path), hf_config(self.path)
        self._metadata = read_metadata(self._weights)
        if self.config["vocab_size"] is None:  # NeMo took it from the tokenizer and padded it
            embedding = self._metadata.state_dict_metadata.get(f"{self._prefix}embedding.word_embeddings.weight")
            self.config["vocab_size"] = embedding.size[0] if embedding else None
        self.architecture = from_hf(self.config)
        self._chunks: dict[tuple[str, tuple[int, ...]], list[ChunkStorageMetadata]] = {}
        self._places = self._locate()
        self._chunk: tuple[ChunkStorageMetadata, torch.Tensor] | None = None

    def dtype(self, name: str) -> str:
        key, _, _ = self._places[name][0]
        return DTYPES[self._metadata.state_dict_metadata[key].properties.dtype]

    def rest(self) -> None:
        self._chunk = None

    def _locate(self) -> dict[str, list[tuple[str, tuple[int, ...], Piece]]]:
        """Canonical name -> (key in the checkpoint, its positions along stacked layers and experts, piece of the
        tensor)."""
        located: dict[str, list[tuple[str, tuple[int, ...], Piece]]] = {}
        for key, entry in self._metadata.state_dict_metadata.items():
            if not key.startswith(self._prefix) or key.startswith(OTHERS) or not hasattr(entry, "size"):
                continue
            stacked = 0
            for name, at in _parameters(key.removeprefix(self._prefix), entry.size, self.architecture):
                stacked = len(at)
                for piece in pieces(name, self.architecture):
                    located.setdefault(piece.tensor, []).append((key, at, piece))
            for chunk in entry.chunks:
                for at in _stacked_in(chunk, stacked):
                    self._chunks.setdefault((key, at), []).append(chunk)
        shapes = self.architecture.shapes()
        if missing := shapes.keys() - located.keys():
            raise InputError(f"the checkpoint '{self.path}' lacks the tensor '{min(missing)}'")
        if surplus := located.keys() - shapes.keys():
            raise InputError(f"the checkpoint '{self.path}' has '{min(surplus)}', which its config does not mention")
        for name, places in located.items():
            if len({self._metadata.state_dict_metadata[key].properties.dtype for key, _, _ in places}) > 1:
                raise InputError(f"the checkpoint '{self.path}' stores '{name}' in several dtypes")
        return located

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
        """The `wanted` elements of one saved tensor, read from the chunks that hold them; `stacked`: the positions of
        the layer (and expert) along the stacked dimensions."""
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

    def _read_chunk(self, key: str, chunk: ChunkStorageMetadata) -> torch.Tensor:
        where = MetadataIndex(key, chunk.offsets)
        if self._chunk is None or self._chunk[0] != where:
            info = self._metadata.storage_data.get(where)
            if info is None:
                raise InputError(f"the checkpoint '{self.path}' does not say where a chunk of '{key}' lies")
            dtype = self._metadata.state_dict_metadata[key].properties.dtype
            self._chunk = (where, load_chunk(place_of(self._weights, info), tuple(chunk.sizes), dtype))
        return self._chunk[1]


def _stacked_in(chunk: ChunkStorageMetadata, dimensions: int) -> Iterator[tuple[int, ...]]:
    """The positions along the stacked dimensions that a chunk covers."""
    bounds = itertools.islice(zip(chunk.offsets, chunk.sizes, strict=True), dimensions)
    return itertools.product(*(range(first, first + size) for first, size in bounds))


def _parameters(name: str, size: torch.Size, a: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    """A checkpoint's key -> Megatron parameters, each with its position in the first dimensions of the saved tensor.

    Layers are stacked along the first dimension, or each has a key; experts are stacked along the next one.
    """
    match = _LAYER.fullmatch(name)
    if not match:
        yield name, ()
        return
    layer, local = match.groups()
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
    """The last checkpoint that `distill` wrote into a folder. Raises InputError if there is none."""
    return folder / read_last(TrainingFolder(folder).last)["checkpoint"]
