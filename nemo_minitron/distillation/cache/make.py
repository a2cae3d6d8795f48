"""A live teacher -> its cache, shard by shard, in any layout.

Shapes (docs/shapes.md): B sequences, S positions of the sequence on this context-parallel rank, N tokens, W columns of
the vocabulary on this rank, K kept entries of a token. A shard here is a file of the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from nemo_minitron.artifacts.cache_settings import CacheSettings
from nemo_minitron.artifacts.logit_cache import CacheHeader, missing, row_key, shard_path, write_shard
from nemo_minitron.artifacts.logit_records import Codec, Kept
from nemo_minitron.backend.collectives import gather_objects
from nemo_minitron.backend.differences import batch_on_this_cp_rank
from nemo_minitron.distillation.cache.sampling import draw, ragged, top, uniforms
from nemo_minitron.errors import InputError

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule

Records = list[list[bytes]]  # a list of rows, each a list of its sets' records


@torch.no_grad()
def make(
    chunks: Sequence[MegatronModule], header: CacheHeader, folder: str | Path, row: Callable[[int], np.ndarray],
    micro_batch_size: int = 1, say: Callable[[int, int], None] = lambda done, of: None,
) -> None:  # fmt: skip
    """Makes the shards that `folder` lacks. Collective over the whole job.

    `chunks`: this rank's Megatron models of the teacher. `row(i)`: the tokens of row i, int [sequence_length], the same
    on every rank. Each data-parallel rank makes its own shards. All of them run in lockstep, because experts may be
    spread over them. One rank writes a shard. `say(done, of)` is called on rank 0 after each round.
    """
    for chunk in chunks:
        chunk.eval()
    from_rank_0 = [missing(folder, header)]
    torch.distributed.broadcast_object_list(from_rank_0, 0)
    shards, of = from_rank_0[0], header.shards
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    for start in range(0, len(shards), size):
        shard = shards[min(start + rank, len(shards) - 1)]  # a rank without one runs along on the last
        most = max(len(header.rows_of(each)) for each in shards[start : start + size])
        rows = [row(i) for i in header.rows_of(shard)]
        records = _run(chunks, header, rows, _micro_batches(rows, most, micro_batch_size, len(chunks)))
        if records and start + rank < len(shards):
            write_shard(shard_path(folder, shard), [row_key(r) for r in rows], records)
        if torch.distributed.get_rank() == 0:
            say(of - len(shards) + min(start + size, len(shards)), of)
    torch.distributed.barrier()


def _micro_batches(rows: list[np.ndarray], most: int, micro: int, virtual: int) -> list[np.ndarray]:
    """Batches [micro, S] of `most` rows. The first row fills them up; its surplus records are not written."""
    stages = parallel_state.get_pipeline_model_parallel_world_size() if virtual > 1 else 1
    multiple = micro * stages  # the interleaved schedule needs a multiple of the stages
    filled = np.stack([*rows, *[rows[0]] * (-(-most // multiple) * multiple - len(rows))])
    return [filled[i : i + micro] for i in range(0, len(filled), micro)]


def _run(
    chunks: Sequence[MegatronModule], header: CacheHeader, rows: list[np.ndarray], batches: list[np.ndarray]
) -> Records:
    """The records of these rows, which come first in the batches. Only the rank that writes them gets any."""
    virtual = len(chunks) > 1
    iterators = [iter(batches) for _ in chunks]
    outputs = get_forward_backward_func()(
        forward_step_func=partial(_step, header),
        data_iterator=iterators if virtual else iterators[0],
        model=list(chunks) if virtual else chunks[0],
        num_microbatches=len(batches),
        seq_length=header.settings.sequence_length,
        micro_batch_size=len(batches[0]),
        forward_only=True,
        collect_non_loss_data=True,
    )
    return [record for records in outputs for record in records][: len(rows)]


def _step(
    header: CacheHeader, iterator: Iterator[np.ndarray], model: MegatronModule
) -> tuple[Tensor, Callable[..., Records]]:
    rows = next(iterator)
    device = torch.cuda.current_device()
    tokens = torch.from_numpy(rows).to(device, torch.int64)
    positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens).contiguous()
    cut = batch_on_this_cp_rank({"tokens": tokens, "positions": positions})
    output = model(input_ids=cut["tokens"], position_ids=cut["positions"], attention_mask=None)
    return output, lambda logits_BSW, non_loss_data=True: _records(header, logits_BSW, rows, cut["positions"])


def _records(header: CacheHeader, logits_BSW: Tensor, rows: np.ndarray, positions_BS: Tensor) -> Records:
    """The records of these rows, on the first rank of TP and CP. Collective over both.

    Raises InputError for logits that are not finite.
    """
    first = parallel_state.get_tensor_model_parallel_rank() * logits_BSW.shape[-1]
    logits_NW = logits_BSW[..., : max(0, header.vocab_size - first)].flatten(0, 1)
    extremes = torch.stack(torch.aminmax(logits_NW)).tolist() if logits_NW.numel() else []
    if not all(map(math.isfinite, extremes)):
        raise InputError(
            f"the teacher's logits are not finite in {header.settings.precision}; check the model, or cache in fp32"
        )
    chosen = _chosen(header.settings, logits_NW, rows, positions_BS, first)
    sets = [_gathered(parts, positions_BS) for parts in chosen]
    if parallel_state.get_tensor_model_parallel_rank() or parallel_state.get_context_parallel_rank():
        return []
    codec = Codec(header.settings, header.vocab_size)
    kept = [[_kept(header.settings, [part[i] for part in parts]) for parts in sets] for i in range(len(rows))]
    return [[codec.encode(one) for one in row] for row in kept]


def _chosen(
    settings: CacheSettings, logits_NW: Tensor, rows: np.ndarray, positions_BS: Tensor, first: int
) -> Iterator[list[Tensor]]:
    """For each set its draws [N, K] and perhaps their ratios p / q, or ids, p [N, K] and tail [N]. Collective over TP.

    `first`: the global id of this rank's first column.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    if not settings.sampled:
        yield list(top(logits_NW, settings.k, settings.temperature, group, first))
        return
    for number in range(settings.sets):
        numbers = torch.from_numpy(np.stack([uniforms(settings, row_key(row), number) for row in rows]))
        positions_BSK = positions_BS[..., None].expand(-1, -1, settings.draws)  # of this context-parallel rank
        numbers_NK = numbers.to(logits_NW.device).gather(1, positions_BSK).flatten(0, 1)
        tokens_NK, ratios_NK = draw(
            logits_NW, numbers_NK, settings.temperature, settings.proposal_temperature, group, first
        )
        yield [tokens_NK] if ratios_NK is None else [tokens_NK, ratios_NK]


def _gathered(parts: list[Tensor], positions_BS: Tensor) -> list[np.ndarray]:
    """[N, ...] of this context-parallel rank -> [B, all positions, ...]. Collective over context parallelism."""
    rows = [part.unflatten(0, positions_BS.shape).cpu().numpy() for part in parts]
    if parallel_state.get_context_parallel_world_size() == 1:
        return rows
    everyone = gather_objects((positions_BS[0].cpu().numpy(), rows), parallel_state.get_context_parallel_group())
    order = np.argsort(np.concatenate([positions for positions, _ in everyone]))
    by_part = zip(*(rows_of_rank for _, rows_of_rank in everyone), strict=True)
    return [np.concatenate(shares, axis=1)[:, order] for shares in by_part]


def _kept(settings: CacheSettings, row: list[np.ndarray]) -> Kept:
    if settings.sampled:
        return Kept(*ragged(row[0], row[1] if len(row) > 1 else None))
    ids, p, tail = row
    return Kept(np.full(len(ids), ids.shape[1]), ids.reshape(-1), None, p.reshape(-1), tail)
