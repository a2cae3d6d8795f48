"""Whose position each position of a micro-batch is: samples, masks and boundaries (docs/reductions.md)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from nemo_minitron.errors import InputError

NOBODY = -1


@dataclasses.dataclass
class Samples:
    """The samples of one micro-batch, the same on all ranks that work on it.

    A sample is a row, also where a row joins documents, unless `cu_seqlens` comes with it. `ids` int64
    [S, B]: the sample of each of this context-parallel rank's positions, -1 where it does not count; None where
    column b is sample b throughout. `counts` fp64 [samples]: positions in the whole sequence. `deal` fp64
    [samples, 2]: to which half a sample belongs, by its tokens, so that no layout deals otherwise. `routed` is
    filled on the way: of each mixture of experts, whose tokens came to its local experts.
    """

    ids: Tensor | None
    counts: Tensor
    deal: Tensor
    routed: dict[Any, list[Tensor]] = dataclasses.field(default_factory=dict)

    @property
    def present(self) -> int:
        return int((self.counts > 0).sum())

    @property
    def tokens(self) -> int:
        return int(self.counts.sum())

    def places(self, split: bool) -> Tensor | None:
        """`ids` of the positions that this rank sees; `split`: under sequence parallelism, its share."""
        if self.ids is None or not split:
            return self.ids
        size, rank = (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_tensor_model_parallel_rank(),
        )
        return self.ids.chunk(size)[rank]

    def local_counts(self, split: bool, positions: int) -> Tensor:
        """fp64 [samples]: how many of the `positions` rows of an activation here are each sample's."""
        places = self.places(split)
        if places is None:
            return torch.full_like(self.counts, positions)
        found = torch.bincount(places[places >= 0], minlength=len(self.counts)).double()
        return found * (positions // len(places))

    def halves(self, split: bool, length: int) -> Tensor:
        """int64 [length, B]: the half of each position, -1 where it does not count. For routed tokens."""
        half = torch.where(self.deal.sum(1) > 0, self.deal.argmax(1), NOBODY)
        places = self.places(split)
        if places is None:
            return half.expand(length, -1)
        return torch.where(places >= 0, half[places.clamp(min=0)], NOBODY)


def samples_of(batch: Mapping[str, Any]) -> Samples:
    """Reads a batch as NeMo's data step gets it, before it is cut over context-parallel ranks.

    `tokens` int64 [B, S]; optional `loss_mask` [B, S] (0 where a position does not count) and `cu_seqlens`
    (boundaries of the samples that one row joins; then B is 1). Raises InputError for a batch that fits neither.
    """
    tokens = batch.get("tokens")
    if tokens is None or tokens.dim() != 2:
        raise InputError("a calibration batch must hold 'tokens' of [batch, sequence]")
    tokens = tokens.to(torch.cuda.current_device())
    mask, boundaries = batch.get("loss_mask"), boundaries_of(batch)
    counted = None if mask is None or bool((mask != 0).all()) else (mask != 0).to(tokens.device)
    if boundaries is None:
        ids, number = torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(tokens), len(tokens)
    else:
        ids, number = _segments(boundaries.to(tokens.device), tokens)
    plain = counted is None and boundaries is None
    if counted is not None:
        ids = ids.masked_fill(~counted, NOBODY)
    return _dealt(tokens, ids, number, plain)


def boundaries_of(batch: Mapping[str, Any]) -> Tensor | None:
    """`cu_seqlens` without the -1 that NeMo's collate function fills it up with; int64 [samples + 1]."""
    given = batch.get("cu_seqlens")
    if given is None:
        return None
    flat = given.flatten().long()
    return flat[flat >= 0] if len(flat) else None


def _segments(boundaries: Tensor, tokens: Tensor) -> tuple[Tensor, int]:
    if len(tokens) != 1:
        raise InputError(f"cu_seqlens came with {len(tokens)} rows; a packed batch has 1")
    if len(boundaries) < 2 or boundaries[0] != 0 or (boundaries.diff() < 0).any() or boundaries[-1] > tokens.shape[1]:
        raise InputError(f"cu_seqlens {boundaries.tolist()} must rise from 0 to at most {tokens.shape[1]}")
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    ids = torch.searchsorted(boundaries, positions, right=True) - 1
    return ids.masked_fill(positions >= boundaries[-1], NOBODY)[None], len(boundaries) - 1


def _dealt(tokens: Tensor, ids: Tensor, number: int, plain: bool) -> Samples:
    """Deals samples to halves by a hash of their tokens at their places, and cuts `ids` over context parallelism."""
    kept, flat = ids >= 0, ids.clamp(min=0)
    counts = torch.zeros(number, dtype=torch.float64, device=ids.device)
    counts.index_add_(0, flat[kept], kept[kept].double())
    places = torch.arange(tokens.shape[1], device=ids.device).expand_as(ids)
    mixed = ((tokens + 1) * (2 * places + 1) * 2654435761) % 1000003
    hashed = torch.zeros(number, dtype=torch.int64, device=ids.device).index_add_(0, flat[kept], mixed[kept])
    deal = torch.nn.functional.one_hot(hashed % 2, 2).double() * (counts > 0)[:, None]
    if plain:
        return Samples(None, counts, deal)
    return Samples(get_batch_on_this_cp_rank({"ids": ids.contiguous()})["ids"].t(), counts, deal)
