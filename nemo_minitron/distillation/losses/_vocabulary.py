"""Shards of the vocabulary: which columns are true, what all ranks gather, and other boundaries for a shard."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def ranks(group: Any) -> tuple[int, int]:
    """(This process's rank, world size) in the tensor-parallel group; None: the vocabulary is whole."""
    if group is None:
        return 0, 1
    return torch.distributed.get_rank(group), torch.distributed.get_world_size(group)


def true_columns(vocab_size: int, width: int, group: Any) -> int:
    """How many of this rank's `width` columns belong to tokens; those behind them pad the vocabulary."""
    return _overlap((0, vocab_size), _columns(ranks(group)[0], width))


def gather(local: Tensor, group: Any) -> Tensor:
    """[k, n] of every rank -> [tp, k, n], in rank order, so that sums over it are the same bits everywhere."""
    world = ranks(group)[1]
    if world == 1:
        return local[None]
    parts = [torch.empty_like(local) for _ in range(world)]
    torch.distributed.all_gather(parts, local.contiguous(), group=group)
    return torch.stack(parts)


def reshard(shard: Tensor, width: int, vocab_size: int, group: Any) -> Tensor:
    """Rows of this rank under one padding -> its true rows under another: [W, ...] -> [at most width, ...].

    Rank r holds rows r * W to (r + 1) * W of the padded vocabulary and wants r * width to (r + 1) * width; rows at and
    beyond `vocab_size` are dropped. One collective, of the rows that change their rank and those that do not.
    """
    rank, world = ranks(group)
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
