"""Stored tensors that hold all experts of a layer, as gpt-oss has them, under the canonical names of single experts.

A stack is [experts, inputs, outputs]: an expert's matrices are transposed, and the outputs of those that share their
input (gate and up) take turns. A stack of biases is [experts, outputs]. gpt-oss is published in MXFP4: a stack of
matrices is then two tensors, `NAME_blocks` [experts, outputs, blocks, 16] with two numbers of four bits a byte, and
`NAME_scales` [experts, outputs, blocks] with an exponent of two for each block of 32. They are read as bf16, which
holds every such number exactly.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from nemo_minitron.artifacts.digest import Index
from nemo_minitron.errors import InputError
from nemo_minitron.sources.headers import Entry
from nemo_minitron.sources.rows import read_rows

_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4 = np.array([*_POSITIVE, *(-value for value in _POSITIVE)], np.float32)
BLOCK = 32  # numbers that share an exponent
BIAS, NO_NUMBER = 127, 255  # of the exponents
PACKED = ("_blocks", "_scales")


class Part(Protocol):
    """A canonical tensor within a stack."""

    @property
    def dtype(self) -> str: ...
    def read(self, index: Index) -> np.ndarray:
        """Raw bits of the outer product of sorted indices, as a new array."""
        ...


@dataclasses.dataclass(frozen=True)
class Stacked:
    """The tensor that is number `part` of the `parts` that take turns in the outputs of an expert."""

    entry: Entry
    expert: int
    part: int
    parts: int

    @property
    def dtype(self) -> str:
        return self.entry.dtype

    def read(self, index: Index) -> np.ndarray:
        (stored,) = read_rows(self.entry, np.array([self.expert]), self.entry.shape[1:])
        return np.ascontiguousarray(stored[..., self.part :: self.parts].T[np.ix_(*index)])


@dataclasses.dataclass(frozen=True)
class Packed:
    """The same in MXFP4; only the rows of `index` are read."""

    blocks: Entry
    scales: Entry
    expert: int
    part: int
    parts: int
    dtype: str = "BF16"

    def read(self, index: Index) -> np.ndarray:
        rows = (self.expert * self.blocks.shape[1]) + index[0] * self.parts + self.part
        return numbers(*(_rows_of(entry, rows) for entry in (self.blocks, self.scales)))[:, index[1]]


def _rows_of(entry: Entry, rows: np.ndarray) -> np.ndarray:
    flat = dataclasses.replace(entry, shape=(math.prod(entry.shape[:2]), *entry.shape[2:]))
    return read_rows(flat, rows, flat.shape[1:])


def numbers(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """MXFP4, uint8 [rows, blocks, 16] and [rows, blocks] -> the bits of bf16, uint16 [rows, 32 blocks].

    The lower four bits of a byte come first. An exponent of 255 is no number, and so are the block's."""
    fours = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, BLOCK)
    exponents = scales.astype(np.int32) - BIAS
    values = np.ldexp(FP4[fours], exponents[..., None], dtype=np.float32)
    values[scales == NO_NUMBER] = np.nan
    return (values.view(np.uint32) >> 16).astype(np.uint16).reshape(len(blocks), -1)


def joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The canonical tensors of an expert, raw bits [outputs, ...] each, as they lie in the stack."""
    return np.stack([part.T for part in parts], axis=-1).reshape(*parts[0].shape[1:], -1)


def claimed(
    name: str,
    parts: Sequence[str],
    turns: int,
    packed: bool,
    find: Callable[[str, tuple[int, ...], tuple[str, ...]], Entry],
    shape: tuple[int, ...],
) -> tuple[dict[str, Part], set[str]]:
    """(canonical name -> where it lies, the names of the stored tensors) of the stack `name` of `shape`.

    `parts`: the canonical tensors, those of an expert one after another, of which `turns` take turns. `packed`: whether
    it is in MXFP4. `find(name, shape, dtypes)` gives the checked entry of a stored tensor. Raises InputError if a
    matrix in MXFP4 has inputs that no blocks of 32 fill.
    """
    places = ((part, *divmod(number, turns)) for number, part in enumerate(parts))
    if not packed or len(shape) == 2:
        entry = find(name, shape, ())
        return {part: Stacked(entry, expert, turn, turns) for part, expert, turn in places}, {name}
    experts, inputs, outputs = shape
    if inputs % BLOCK:
        raise InputError(f"'{name}' in MXFP4 has {inputs} inputs; they must be a multiple of {BLOCK}")
    stored = (experts, outputs, inputs // BLOCK)
    names = [name + ending for ending in PACKED]
    blocks, scales = find(names[0], (*stored, BLOCK // 2), ("U8",)), find(names[1], stored, ("U8",))
    return {part: Packed(blocks, scales, expert, turn, turns) for part, expert, turn in places}, set(names)
