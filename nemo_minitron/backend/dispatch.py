"""Megatron's all-to-all dispatch of tokens to experts, over gloo.

Megatron moves its split sizes from the GPU to numpy. On a CPU they stay tensors, which torch's collectives refuse. And
if tensor-parallel ranks have unequal numbers of tokens, gloo neither gathers nor scatters them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_minitron.backend.collectives import gather
from nemo_minitron.backend.versions import replace

Sizes = list[int] | None


def redirect() -> None:
    """Mends the dispatcher's collectives for the rest of this process."""
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe import token_dispatcher

    replace(token_dispatcher, "all_to_all", _all_to_all(token_dispatcher.all_to_all))
    for name, unequal in (
        ("_gather_along_first_dim", gather_unequal),
        ("_reduce_scatter_along_first_dim", reduce_scatter_unequal),
    ):
        replace(mappings, name, _or_unequal(getattr(mappings, name), unequal))


def _all_to_all(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def all_to_all(group: Any, x: Tensor, output_splits: Any = None, input_splits: Any = None, **more: Any) -> Tensor:
        return original(group, x, _plain(output_splits), _plain(input_splits), **more)

    return all_to_all


def _plain(sizes: Any) -> Sizes:
    return sizes.tolist() if isinstance(sizes, Tensor) else sizes


def _or_unequal(
    original: Callable[..., Tensor], unequal: Callable[[Tensor, Any, list[int]], Tensor]
) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def collective(x: Tensor, group: Any, sizes: Sizes = None, use_global_buffer: bool = False) -> Tensor:
        if sizes is None or len(set(sizes)) == 1:
            return original(x, group, sizes, use_global_buffer)
        return unequal(x, group, sizes)

    return collective


def gather_unequal(x: Tensor, group: Any, sizes: list[int]) -> Tensor:
    """[sizes[rank], ...] of each rank -> [sum of sizes, ...]. It has no gradient."""
    padded = F.pad(x, (0, 0) * (x.dim() - 1) + (0, max(sizes) - x.shape[0]))
    return torch.cat([part[:size] for part, size in zip(gather(padded, group), sizes, strict=True)])


def reduce_scatter_unequal(x: Tensor, group: Any, sizes: list[int]) -> Tensor:
    """[sum of sizes, ...] of each rank -> this rank's rows of their sum, [sizes[rank], ...]. It has no gradient."""
    total = x.clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(total, group=group)
    return total.split(sizes)[group.rank()].clone()
