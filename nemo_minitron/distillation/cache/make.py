"""A live teacher -> its cache, shard by shard, in whatever layout it runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from nemo_minitron.artifacts.cache_settings import CacheSettings
from nemo_minitron.artifacts.logit_cache import CacheHeader, missing, row_key, shard_path, write_shard
from nemo_minitron.artifacts.logit_records import Codec, Kept
from nemo_minitron.distillation.cache.sampling import draw, ragged, top, uniforms
from nemo_minitron.errors import InputError

Records = list[list[bytes]]  # of each row, of each set


@torch.no_grad()
def make(
    chunks: Sequence[Any], header: CacheHeader, folder: str | Path, row: Callable[[int], np.ndarray],
    micro_batch_size: int = 1, say: Callable[[int, int], None] = lambda done, of: None,
) -> None:  # fmt: skip
    """Makes the shards that `folder` lacks. Collective over the whole job.

    `chunks`: the teacher, this rank's Megatron models. `row(i)`: the tokens of row i, int [sequence_length], the
    same on every rank. Data-parallel ranks take turns at whole shards, in lockstep, since experts may be spread
    over them; each shard is written by one rank. `say(done, of)` is called on rank 0 after each round.
    """
    for chunk in chunks:
        chunk.eval()
    wanted = [missing(folder, header)]
    torch.distributed.broadcast_object_list(wanted, 0)
    shards, of = wanted[0], header.shards
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    for start in range(0, len(shards), size):
        mine = shards[min(start + rank, len(shards) - 1)]
        most = max(len(header.rows_of(shard)) for shard in shards[start : start + size])
        rows = [row(i) for i in header.rows_of(mine)]
        records = _run(chunks, header, rows, _micro_batches(rows, most, micro_batch_size, len(chunks)))
        if records and start + rank < len(shards):
            write_shard(shard_path(folder, mine), [row_key(r) for r in rows], records)
        if torch.distributed.get_rank() == 0:
            say(of - len(shards) + min(start + size, len(shards)), of)
    torch.distributed.barrier()


def _micro_batches(rows: list[np.ndarray], most: int, micro: int, virtual: int) -> list[np.ndarray]:
    """[micro, S] each, for `most` rows; filled up with the first row, whose surplus records nobody writes."""
    stages = parallel_state.get_pipeline_model_parallel_world_size() if virtual > 1 else 1
    whole = micro * stages  # the interleaved schedule wants a multiple of the stages
    filled = np.stack([*rows, *[rows[0]] * (-(-most // whole) * whole - len(rows))])
    return [filled[i : i + micro] for i in range(0, len(filled), micro)]


def _run(chunks: Sequence[Any], header: CacheHeader, rows: list[np.ndarray], batches: list[np.ndarray]) -> Records:
    """The records of these rows, the first ones of the batches, on the rank that writes them; none on all others."""
    virtual = len(chunks) > 1
    iterators = [iter(batches) for _ in chunks]
    found = get_forward_backward_func()(
        forward_step_func=partial(_step, header),
        data_iterator=iterators if virtual else iterators[0],
        model=list(chunks) if virtual else chunks[0],
        num_microbatches=len(batches),
        seq_length=header.settings.sequence_length,
        micro_batch_size=len(batches[0]),
        forward_only=True,
        collect_non_loss_data=True,
    )
    return [record for batch in found for record in batch][: len(rows)]


def _step(header: CacheHeader, iterator: Iterator[np.ndarray], model: Any) -> tuple[Tensor, Callable[..., Records]]:
    rows = next(iterator)
    device = torch.cuda.current_device()
    tokens = torch.from_numpy(rows).to(device, torch.int64)
    places = torch.arange(tokens.shape[1], device=device).expand_as(tokens).contiguous()
    cut = get_batch_on_this_cp_rank({"tokens": tokens, "places": places})
    output = model(input_ids=cut["tokens"], position_ids=cut["places"], attention_mask=None)
    return output, lambda logits, non_loss_data=True: _records(header, logits, rows, cut["places"])


def _records(header: CacheHeader, logits: Tensor, rows: np.ndarray, places: Tensor) -> Records:
    """[B, S/cp, V/tp] -> the records of these rows, on the first rank of TP and CP. Collective over both. Raises
    InputError for logits that are not finite."""
    first = parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1]
    flat = logits[..., : max(0, header.vocab_size - first)].flatten(0, 1)
    if flat.numel() and not all(math.isfinite(extreme) for extreme in torch.stack(torch.aminmax(flat)).tolist()):
        raise InputError(
            f"the teacher's logits are not finite in {header.settings.precision}; check the model, or cache in fp32"
        )
    sets = [_whole(found, places) for found in _chosen(header.settings, flat, rows, places, first)]
    if parallel_state.get_tensor_model_parallel_rank() or parallel_state.get_context_parallel_rank():
        return []
    codec = Codec(header.settings, header.vocab_size)
    kept = [[_kept(header.settings, [part[i] for part in parts]) for parts in sets] for i in range(len(rows))]
    return [[codec.encode(one) for one in row] for row in kept]


def _chosen(
    settings: CacheSettings, flat: Tensor, rows: np.ndarray, places: Tensor, first: int
) -> Iterator[list[Tensor]]:
    """Of each set: draws [B * S/cp, n] and perhaps their ratios, or ids, p and tail. Collective over TP."""
    group = parallel_state.get_tensor_model_parallel_group()
    if not settings.sampled:
        yield list(top(flat, settings.k, settings.temperature, group, first))
        return
    for number in range(settings.sets):
        drawn = torch.from_numpy(np.stack([uniforms(settings, row_key(row), number) for row in rows]))
        own = drawn.to(flat.device).gather(1, places[..., None].expand(-1, -1, settings.draws)).flatten(0, 1)
        tokens, ratios = draw(flat, own, settings.temperature, settings.proposal_temperature, group, first)
        yield [tokens] if ratios is None else [tokens, ratios]


def _whole(parts: list[Tensor], places: Tensor) -> list[np.ndarray]:
    """[B * S/cp, ...] of this context-parallel rank -> [B, S, ...] of all."""
    rows = [part.unflatten(0, places.shape).cpu().numpy() for part in parts]
    if parallel_state.get_context_parallel_world_size() == 1:
        return rows
    everyone: list[Any] = [None] * parallel_state.get_context_parallel_world_size()
    own = (places[0].cpu().numpy(), rows)
    torch.distributed.all_gather_object(everyone, own, group=parallel_state.get_context_parallel_group())
    order = np.argsort(np.concatenate([where for where, _ in everyone]))
    return [np.concatenate(shares, axis=1)[:, order] for shares in zip(*(held for _, held in everyone), strict=True)]


def _kept(settings: CacheSettings, row: list[np.ndarray]) -> Kept:
    if settings.sampled:
        return Kept(*ragged(row[0], row[1] if len(row) > 1 else None))
    ids, p, tail = row
    return Kept(np.full(len(ids), ids.shape[1]), ids.reshape(-1), None, p.reshape(-1), tail)
