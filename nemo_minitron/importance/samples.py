"""The sample of each position of a micro-batch: samples, masks and boundaries (docs/reductions.md).

Shapes (docs/shapes.md): S positions of the sequence, B sequences, J samples, Z the two halves of the samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from megatron.core import parallel_state
from torch import Tensor

from nemo_minitron.backend.differences import batch_on_this_cp_rank
from nemo_minitron.backend.masks import given_mask
from nemo_minitron.errors import InputError

if TYPE_CHECKING:
    from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher

NOBODY = -1


@dataclasses.dataclass
class Samples:
    """The samples of one micro-batch, the same on all ranks that work on it.

    A sample is a row, even if the row joins documents, unless the batch has `cu_seqlens`. `ids` int64 [S, B]: the
    sample of each of this context-parallel rank's positions, -1 if the position does not count. None: column b is
    sample b everywhere. `counts` fp64 [J]: positions in the whole sequence. `deal` fp64 [J, Z]: the half that a sample
    belongs to. It depends only on the sample's tokens, so every layout deals alike. `routed` is filled in the forward
    pass: for each mixture of experts the halves of the tokens that came to its local experts.
    """

    ids: Tensor | None
    counts: Tensor
    deal: Tensor
    routed: dict[MoETokenDispatcher, list[Tensor]] = dataclasses.field(default_factory=dict)

    @property
    def present(self) -> int:
        return int((self.counts > 0).sum())

    @property
    def tokens(self) -> int:
        return int(self.counts.sum())

    def places(self, split: bool) -> Tensor | None:
        """`ids` of the positions that this rank sees. `split`: its share of them, under sequence parallelism."""
        if self.ids is None or not split:
            return self.ids
        size, rank = (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_tensor_model_parallel_rank(),
        )
        return self.ids.chunk(size)[rank]

    def local_counts(self, split: bool, positions: int) -> Tensor:
        """fp64 [J]: how many of the `positions` of an activation on this rank belong to each sample."""
        ids_SB = self.places(split)
        if ids_SB is None:
            return torch.full_like(self.counts, positions)
        counts_J = torch.bincount(ids_SB[ids_SB >= 0], minlength=len(self.counts)).double()
        return counts_J * (positions // len(ids_SB))  # heads may stand in the place of channels

    def halves(self, split: bool, length: int) -> Tensor:
        """int64 [length, B]: the half of each position, -1 if it does not count. For routed tokens."""
        half_J = torch.where(self.deal.sum(1) > 0, self.deal.argmax(1), NOBODY)
        ids_SB = self.places(split)
        if ids_SB is None:
            return half_J.expand(length, -1)
        return torch.where(ids_SB >= 0, half_J[ids_SB.clamp(min=0)], NOBODY)


def samples_of(batch: Mapping[str, Tensor]) -> Samples:
    """Reads a batch as NeMo's data step gets it, before it is cut over context-parallel ranks.

    `tokens` int64 [B, S]. Optional: `loss_mask` [B, S], 0 where a position does not count, and `cu_seqlens`, the
    boundaries of the samples that one row joins (then B is 1). Raises InputError for a batch of another form.
    """
    tokens = batch.get("tokens")
    if tokens is None or tokens.dim() != 2:
        raise InputError("a calibration batch must hold 'tokens' of [batch, sequence]")
    given_mask(batch.get("attention_mask"))
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


def boundaries_of(batch: Mapping[str, Tensor]) -> Tensor | None:
    """`cu_seqlens` without the -1 with which NeMo's collate function fills it up; int64 [J + 1]."""
    boundaries = batch.get("cu_seqlens")
    if boundaries is None:
        return None
    flat = boundaries.flatten().long()
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
    """Deals samples to halves by a hash of their tokens and positions. Cuts `ids` [B, S] for context parallelism."""
    counted, ids_of_all = ids >= 0, ids.clamp(min=0)
    counts_J = torch.zeros(number, dtype=torch.float64, device=ids.device)
    counts_J.index_add_(0, ids_of_all[counted], counted[counted].double())
    positions = torch.arange(tokens.shape[1], device=ids.device).expand_as(ids)
    mixed = ((tokens + 1) * (2 * positions + 1) * 2654435761) % 1000003
    hash_J = torch.zeros(number, dtype=torch.int64, device=ids.device)
    hash_J.index_add_(0, ids_of_all[counted], mixed[counted])
    deal_JZ = torch.nn.functional.one_hot(hash_J % 2, 2).double() * (counts_J > 0)[:, None]
    if plain:
        return Samples(None, counts_J, deal_JZ)
    return Samples(batch_on_this_cp_rank({"ids": ids.contiguous()})["ids"].t(), counts_J, deal_JZ)
