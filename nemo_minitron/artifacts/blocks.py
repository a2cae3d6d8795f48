"""Contiguous blocks of layers, as scores of depth are keyed."""

from __future__ import annotations

BLOCK_INFLUENCE = "block_influence"  # a criterion of depth that every calibration gathers
REMOVAL = "removal"  # another, whose layers stand in the order in which they went
Block = tuple[int, int]  # first and last dropped layer, both inclusive, 0-based, numbered as in the source
NOTHING: Block = (0, -1)  # the empty block: the undropped model, which every scan holds as its baseline


def size_of(block: Block) -> int:
    """How many layers a block has; 0 for `NOTHING`."""
    return block[1] - block[0] + 1
