"""Shards of the vocabulary: which columns are true, and other boundaries for a shard."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nemo_minitron.backend.collectives import rank_and_size


def true_columns(vocab_size: int, width: int, group: Any) -> int:
    """How many of this rank's `width` columns belong to tokens; those behind them pad the vocabulary."""
    return _overlap((0, vocab_size), _columns(rank_and_size(group)[0], width))


def reshard(shard: Tensor, width: int, vocab_size: int, group: Any) -> Tensor:
    """Rows of this rank under one padding -> its true rows under another: [W, ...] -> [at most width, ...].

    Rank r holds rows r * W to (r + 1) * W of the padded vocabulary and wants r * width to (r + 1) * width; rows at and
    beyond `vocab_size` are dropped. One collective, of the rows that change their rank and those that do not.
    """
    rank, world = rank_and_size(group)
    mine = _columns(rank, shard.shape[0])
    send = [_overlap(mine, _true(r, width, vocab_size)) for r in range(world)]
    wanted = _true(rank, width, vocab_size)
    receive = [_overlap(wanted, _columns(r, shard.shape[0])) for r in range(world)]
    held = shard[: sum(send)].contiguous()
    if world == 1:
        return held
    found = held.new_empty(sum(receive), *shard.shape[1:])
    torch.distributed.all_to_all_single(found, held, receive, send, group=group)
    return found


def _columns(rank: int, width: int) -> tuple[int, int]:
    return rank * width, (rank + 1) * width


def _true(rank: int, width: int, vocab_size: int) -> tuple[int, int]:
    first, last = _columns(rank, width)
    return first, min(last, vocab_size)


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> int:
    return max(0, min(one[1], other[1]) - max(one[0], other[0]))
