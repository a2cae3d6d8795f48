"""Shards of the vocabulary: which columns belong to tokens, and how a shard gets other boundaries.

Megatron pads the vocabulary until every rank has the same width. Rank r holds the columns r * width to
(r + 1) * width of the padded vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nemo_minitron.backend.collectives import rank_and_size

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Range = tuple[int, int]  # first column, and the one behind the last


def true_columns(vocab_size: int, width: int, group: ProcessGroup | None) -> int:
    """How many of this rank's `width` columns belong to tokens. The columns behind them are padding."""
    return _overlap((0, vocab_size), _columns(rank_and_size(group)[0], width))


def reshard(shard: Tensor, width: int, vocab_size: int, group: ProcessGroup | None) -> Tensor:
    """Rows of this rank under one padding -> its true rows under another: [W, ...] -> [at most width, ...].

    `shard`: rows r * W to (r + 1) * W of the padded vocabulary; the result has rows r * width to (r + 1) * width. Rows
    at and beyond `vocab_size` are dropped. One collective; it also moves the rows that stay on their rank.
    """
    rank, size = rank_and_size(group)
    columns, wanted = _columns(rank, shard.shape[0]), _true_columns(rank, width, vocab_size)
    sent = [_overlap(columns, _true_columns(r, width, vocab_size)) for r in range(size)]
    received = [_overlap(wanted, _columns(r, shard.shape[0])) for r in range(size)]
    rows = shard[: sum(sent)].contiguous()
    if size == 1:
        return rows
    resharded = rows.new_empty(sum(received), *shard.shape[1:])
    torch.distributed.all_to_all_single(resharded, rows, received, sent, group=group)
    return resharded


def _columns(rank: int, width: int) -> Range:
    return rank * width, (rank + 1) * width


def _true_columns(rank: int, width: int, vocab_size: int) -> Range:
    first, last = _columns(rank, width)
    return first, min(last, vocab_size)


def _overlap(one: Range, other: Range) -> int:
    return max(0, min(one[1], other[1]) - max(one[0], other[0]))
