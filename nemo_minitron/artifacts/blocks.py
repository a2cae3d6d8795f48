"""Contiguous blocks of layers: the keys of scores of depth, and the gaps that a plan leaves."""

from __future__ import annotations

from typing import NamedTuple

BLOCK_INFLUENCE = "block_influence"  # a criterion of depth that every calibration gathers
REMOVAL = "removal"  # another one, which lists the layers in the order of their removal
Block = tuple[int, int]  # first and last dropped layer, both inclusive, 0-based, numbered as in the source
NOTHING: Block = (0, -1)  # the empty block: the whole model, the baseline of every scan


class Gap(NamedTuple):
    """A block of removed layers: the first of them, and the layer behind them, as numbered in the source."""

    first: int
    behind: int


def size_of(block: Block) -> int:
    """The number of layers in a block; 0 for `NOTHING`."""
    return block[1] - block[0] + 1
