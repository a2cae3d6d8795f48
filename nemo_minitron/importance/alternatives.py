"""Scores without a running model, to compare with: the magnitude of the weights, and chance.

Both have the axes that activations give, but neither `norms`, the single norms behind `hidden`, nor `stream`. They have
no statistics, and their `method` says what they are. They need no torch.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts.dtypes import as_numbers
from nemo_minitron.artifacts.json_types import JsonObject
from nemo_minitron.artifacts.scores import Scores, expected_shapes
from nemo_minitron.axes import AXES, owners, split_expert, split_name
from nemo_minitron.errors import InputError

ROWS = 4096  # rows of a tensor that are converted to float64 at a time


class Source(Protocol):
    """Canonical tensors that can be read in blocks: a Hugging Face folder, a checkpoint, a live Megatron model."""

    architecture: Architecture

    def dtype(self, name: str) -> str:
        """The safetensors name of a tensor's dtype."""
        ...

    def read(self, name: str, index: tuple[np.ndarray, ...]) -> np.ndarray:
        """Raw bits of the outer product of sorted indices."""
        ...


def magnitude(source: Source) -> Scores:
    """The L2 norm of all weights that belong to a unit, by the table in `axes.py`.

    The weights of an expert are its row of the router and all its matrices (a correction bias is none), those of a
    query group its keys, its values and its heads, those of a layer all its tensors. For a live, sharded model
    (`LiveSource`) it is collective and the same on every rank.
    """
    a = source.architecture
    squares = {name: np.zeros(shape) for name, shape in expected_shapes(a).items() if name != "norms"}
    for name, shape in a.shapes().items():
        layer, local = split_name(name)
        if local == "router.expert_bias":  # it says nothing of what an expert computes
            continue
        expert, _ = split_expert(local)
        along = _squares(source, name, shape)
        if layer is not None:
            squares["layers"][layer] += along[0].sum()
        if expert is not None:
            squares["experts"][layer, expert] += along[0].sum()
        for axis, row in owners(name):
            if axis.name in squares:
                place = tuple(i for i in (layer, expert) if i is not None)
                place = place if axis.per_expert else place[:1] if axis.per_layer else ()
                unit, each = row.sizes(a)
                squares[axis.name][place] += along[row.dim].reshape(each, -1, unit).sum((0, 2))
    if "query_groups" in squares:
        squares["query_groups"] += squares["heads"].reshape(*squares["query_groups"].shape, -1).sum(-1)
    return _scores(a, {name: np.sqrt(array) for name, array in squares.items()}, "magnitude")


def _squares(source: Source, name: str, shape: tuple[int, ...]) -> list[np.ndarray]:
    """For each dimension, float64 [size]: the sum of squares of each slice."""
    along = [np.zeros(size) for size in shape]
    for index in _blocks(shape):
        block = as_numbers(source.read(name, index), source.dtype(name)) ** 2
        for dim, total in enumerate(along):
            total[index[dim]] += block.sum(axis=tuple(d for d in range(len(shape)) if d != dim))
    return along


def _blocks(shape: tuple[int, ...]) -> Iterator[tuple[np.ndarray, ...]]:
    for start in range(0, shape[0], ROWS):
        yield (np.arange(start, min(start + ROWS, shape[0])), *(np.arange(size) for size in shape[1:]))


def random_scores(architecture: Architecture, seed: int = 0) -> Scores:
    """Uniform in [0, 1). Each axis has its own PCG64 generator, seeded by (seed, axis). A layer without it has zeros.

    Raises InputError for a negative seed.
    """
    if seed < 0:
        raise InputError(f"seed={seed} is not legal; legal are whole numbers from 0, the nearest is 0")
    tensors = {}
    for name, shape in expected_shapes(architecture).items():
        if name not in AXES:  # norms and the stream's length are measured, not ranked
            continue
        tensors[name] = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())])).random(shape)
        if AXES[name].per_layer:
            tensors[name][sorted({*range(architecture.num_layers)} - {*AXES[name].layers_of(architecture)})] = 0
    return _scores(architecture, tensors, "random", {"seed": seed})


def _scores(
    architecture: Architecture, tensors: dict[str, np.ndarray], method: str, notes: JsonObject | None = None
) -> Scores:
    present = {name: tensor.astype(np.float32) for name, tensor in tensors.items() if tensor.any()}
    return Scores(architecture, present, criterion=method, method=method, notes=notes or {})
