"""The interface of a teacher for a cut: canonical tensors that can be read in blocks, as raw bits.

Raw bits are unsigned integers of the stored dtype's size (bf16 -> uint16, fp32 -> uint32). A cut moves them and never
computes (but for two tensors of a Gemma, in one function: `pruning/rescale.py`), so the same plan gives the same
bytes from every source that stores the same dtype.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Protocol

import numpy as np

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts.digest import Index, model_digest
from nemo_minitron.artifacts.dtypes import bf16_bits
from nemo_minitron.artifacts.files import digest_of
from nemo_minitron.artifacts.json_types import JsonObject

# safetensors dtype -> raw bits
RAW = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32, "F64": np.uint64}


class TensorSource(Protocol):
    """A model that can be read in blocks: a Hugging Face folder, a checkpoint."""

    architecture: Architecture

    def dtype(self, name: str) -> str:
        """The safetensors name of the dtype that stores canonical tensor `name`."""
        ...

    def read(self, name: str, index: Index) -> np.ndarray:
        """Raw bits of the outer product of sorted indices, one array per dimension, as a new array."""
        ...


class ModelSource:
    """A TensorSource that is a whole model on disk, at `path`: with its Hugging Face config, and the `folder` that has
    its tokenizer. Stages pass an opened one on, so that its headers and its identity are read once."""

    architecture: Architecture
    config: JsonObject
    folder: Path
    path: Path

    def dtype(self, name: str) -> str:
        raise NotImplementedError

    def read(self, name: str, index: Index) -> np.ndarray:
        raise NotImplementedError

    def rest(self) -> None:
        """Releases what reading keeps in memory, because an opened model may stay open for long."""

    @functools.cached_property
    def digest(self) -> str:
        """The model digest. It is computed when it is first asked for."""
        digest = source_digest(self)
        self.rest()
        return digest

    @functools.cached_property
    def identity(self) -> list[str]:
        """The model digest, and the config's: an edited rope_theta is another model."""
        return [self.digest, digest_of(dict(self.config))]


def whole(shape: tuple[int, ...]) -> Index:
    """The index of a whole tensor."""
    return tuple(np.arange(n) for n in shape)


def source_digest(source: TensorSource) -> str:
    """The model digest of a source, sha256 in hex; reads one small block of each tensor."""
    return model_digest(
        source.architecture, lambda name, index: bf16_bits(source.read(name, index), source.dtype(name))
    )
