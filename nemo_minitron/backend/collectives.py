"""What every rank of a group contributes, in rank order: so that what is made of it has the same bits on every rank.

For tensors, `group` None means that there is no group: this process holds everything.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rank_and_size(group: Any) -> tuple[int, int]:
    """(This process's rank, number of ranks) in the group; (0, 1) without a group."""
    if group is None:
        return 0, 1
    return torch.distributed.get_rank(group), torch.distributed.get_world_size(group)


def gather(local: Tensor, group: Any) -> list[Tensor]:
    """Every rank's tensor; all have one shape and dtype. One rank alone gets its own tensor, not a copy."""
    size = rank_and_size(group)[1]
    if size == 1:
        return [local]
    parts = [torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(size)]
    torch.distributed.all_gather(parts, local.contiguous(), group=group)
    return parts


def gather_stacked(local: Tensor, group: Any) -> Tensor:
    """[...] of every rank -> [ranks, ...]. One rank alone gets a view of its own tensor."""
    parts = gather(local, group)
    return torch.stack(parts) if len(parts) > 1 else local[None]


def gather_first_dim(local: Tensor, group: Any) -> Tensor:
    """[n, ...] of every rank -> [ranks * n, ...]. Received in place: no second copy is held, unlike with `gather`."""
    size = rank_and_size(group)[1]
    if size == 1:
        return local
    joined = local.new_empty(local.shape[0] * size, *local.shape[1:])
    torch.distributed.all_gather_into_tensor(joined, local.contiguous(), group=group)
    return joined


def gather_objects(value: Any, group: Any) -> list[Any]:
    """Every rank's picklable object; `group` must be a group of the job."""
    everyone: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(everyone, value, group=group)
    return everyone
