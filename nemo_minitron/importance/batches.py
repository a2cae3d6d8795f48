"""A user's calibration batches -> micro-batches of one shape, as many on every rank.

If a layout cannot divide them, they are filled up with masked positions and masked samples, which count nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from nemo_minitron.backend.differences import batch_on_this_cp_rank, ends_of_states
from nemo_minitron.backend.masks import given_mask
from nemo_minitron.backend.precision import recipe_of
from nemo_minitron.backend.wrappers import unwrap
from nemo_minitron.errors import InputError
from nemo_minitron.importance.samples import boundaries_of
from nemo_minitron.precisions import token_multiple

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import MegatronModule

Batch = dict[str, Tensor]


class Watcher(Protocol):
    """Hooks on a model, which must know the micro-batch that comes next."""

    def expect(self, batch: Batch, first: bool = True) -> None: ...


def micro_batches(batches: Iterable[Batch | Tensor], config: TransformerConfig, *, virtual: bool) -> list[Batch]:
    """This data-parallel rank's micro-batches, each with `tokens, loss_mask` [B, S] and perhaps `cu_seqlens`.

    `config`: Megatron's, of the model that they go through. `virtual`: the model has virtual stages, and the
    interleaved schedule needs a number of batches that is divisible by the pipeline's stages. Collective over the whole
    job. Raises InputError if no rank has a batch, and for padding on the left. Without a `loss_mask` the positions that
    transformers' `attention_mask` [B, S] has as padding do not count.
    """
    checked = [_read(batch) for batch in batches]
    device = torch.cuda.current_device()
    rows, length = (max((b["tokens"].shape[d] for b in checked), default=0) for d in (0, 1))
    largest = torch.tensor([len(checked), rows, length], device=device)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    number, rows, length = largest.tolist()
    if not number:
        raise InputError("no calibration batches were given; at least one is needed")
    multiple = length_multiple(config, rows)
    length = -(-length // multiple) * multiple
    if virtual:
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        number = -(-number // stages) * stages
    empty = {"tokens": torch.zeros(1, 1, dtype=torch.int64), "loss_mask": torch.zeros(1, 1)}
    return [_filled(batch, rows, length) for batch in [*checked, *[empty] * (number - len(checked))]]


def length_multiple(config: TransformerConfig, rows: int) -> int:
    """The number that the length of `rows` sequences must be a multiple of.

    Context and sequence parallelism cut the sequence, and FP8 needs a multiple of so many tokens.
    """
    parts = config.tensor_model_parallel_size if config.sequence_parallel else 1
    context = parallel_state.get_context_parallel_world_size()
    tokens = context * token_multiple(recipe_of(config), parts)
    return math.lcm(parts * (2 * context if context > 1 else 1), tokens // math.gcd(tokens, rows))


def _read(batch: Batch | Tensor) -> Batch:
    if not isinstance(batch, dict):
        batch = {"tokens": torch.as_tensor(batch)}
    tokens = batch.get("tokens")
    if tokens is None or tokens.dim() != 2 or not tokens.numel():
        raise InputError("a calibration batch must be tokens of [batch, sequence], or a dict with such 'tokens'")
    mask, attended = batch.get("loss_mask"), batch.get("attention_mask")
    given_mask(attended)
    if mask is None and attended is not None and attended.dim() == 2:
        mask = attended > 0
    if mask is not None and mask.shape != tokens.shape:
        raise InputError(f"loss_mask is {tuple(mask.shape)}; it must be as the tokens, {tuple(tokens.shape)}")
    read = {"tokens": tokens, "loss_mask": torch.ones(tokens.shape) if mask is None else mask.float()}
    boundaries = boundaries_of(batch)
    return read if boundaries is None else read | {"cu_seqlens": boundaries}


def _filled(batch: Batch, rows: int, length: int) -> Batch:
    """The batch with more positions at the end of its rows, which no earlier position sees, and more rows."""
    have = batch["tokens"].shape
    by = (0, length - have[1], 0, rows - have[0])
    filled = {name: torch.nn.functional.pad(batch[name], by) for name in ("tokens", "loss_mask")}
    if "cu_seqlens" in batch:
        filled["cu_seqlens"] = batch["cu_seqlens"]
    return filled


def forward_arguments(batch: Batch, model: MegatronModule) -> dict[str, Tensor | PackedSeqParams | None]:
    """What Megatron's model takes of a micro-batch, cut over context-parallel ranks: `packed_seq_params` of packed
    samples alone, since the hybrid model of Megatron-core 0.15 does not know it."""
    device = torch.cuda.current_device()
    tokens = batch["tokens"].to(device)
    positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
    packed: dict[str, PackedSeqParams] = {}
    if "cu_seqlens" in batch:
        hybrid = unwrap(model).config.is_hybrid_model
        packed["packed_seq_params"], positions = _packed(batch["cu_seqlens"].to(device), tokens.shape[1], hybrid)
    cut = batch_on_this_cp_rank({"tokens": tokens.contiguous(), "position_ids": positions.contiguous()})
    return {
        "input_ids": cut["tokens"], "position_ids": cut["position_ids"], "attention_mask": None, **packed,
    }  # fmt: skip


def _packed(boundaries: Tensor, length: int, hybrid: bool) -> tuple[PackedSeqParams, Tensor]:
    """Attention that stays within each sample. The positions behind the last sample form one more sample, which does
    not count."""
    if boundaries[-1] < length:
        boundaries = torch.cat([boundaries, boundaries.new_tensor([length])])
    places = torch.arange(length, device=boundaries.device)
    starts = boundaries[torch.searchsorted(boundaries, places, right=True) - 1]
    sizes, longest = boundaries.int(), int(boundaries.diff().max())
    params = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=sizes, cu_seqlens_kv=sizes, max_seqlen_q=longest, max_seqlen_kv=longest,
        **ends_of_states(length, hybrid),
    )  # fmt: skip
    return params, (places - starts)[None]


def seen(batches: list[Batch], chunk: int, watcher: Watcher) -> Iterator[Batch]:
    """The micro-batches in the order in which a chunk gets them. The watcher gets each one just before."""
    for batch in batches:
        watcher.expect(batch, first=chunk == 0)
        yield batch
