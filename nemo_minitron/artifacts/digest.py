"""A model's digest: the same from a Hugging Face folder, a checkpoint and a live, sharded model.

It covers canonical names, global shapes and a fixed, seeded sample of elements of each tensor, rounded to
bfloat16, so that it costs seconds for any model and does not depend on the dtype that stores the weights.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable

import numpy as np

from nemo_minitron.architecture import Architecture

SIDE = 16  # a sample is a block of up to 16 x 16 elements

Index = tuple[np.ndarray, ...]  # sorted indices, one array per dimension; the block is their outer product


def sample_index(name: str, shape: tuple[int, ...]) -> Index:
    """The rows and columns of tensor `name` that the digest covers: sorted, drawn with a seed made of the name."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    return tuple(np.sort(generator.choice(n, size=min(n, SIDE), replace=False)) for n in shape)


def model_digest(architecture: Architecture, read_bits: Callable[[str, Index], np.ndarray]) -> str:
    """sha256 over all tensors, in hex; `read_bits(name, index)` returns the bfloat16 bits of a block (uint16)."""
    digest = hashlib.sha256()
    for name, shape in sorted(architecture.shapes().items()):
        block = np.ascontiguousarray(read_bits(name, sample_index(name, shape)), np.uint16)
        digest.update(f"{name}{shape}".encode())
        digest.update(block.tobytes())
    return digest.hexdigest()
