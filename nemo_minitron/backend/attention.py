"""Core attention by torch's scaled_dot_product_attention, in the place of Transformer Engine's."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from nemo_minitron.backend import packing
from nemo_minitron.errors import InputError

CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)


class Attention(MegatronModule):
    """softmax(Q K^T * scale) V, the same numbers as Megatron's unfused DotProductAttention.

    Rotary embedding and QK norm come before it. It has no parameters. `softmax_scale` defaults to
    1/sqrt(head_dim); Megatron's query-key layer scaling divides and multiplies by the same number, and so needs
    nothing. Under context parallelism each rank gathers all keys and values, in Megatron's order of the
    sequence (two chunks a rank, one from either end). Raises InputError for softmax offsets, which it lacks.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        if config.softmax_type != "vanilla":
            raise InputError(f"softmax_type '{config.softmax_type}' needs Transformer Engine; legal is 'vanilla'")
        self.attn_mask_type, self.softmax_scale = attn_mask_type, softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        window = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = tuple(config.window_size) if window else None
        self.context = None
        if config.context_parallel_size > 1:
            self.context = getattr(pg_collection, "cp", None) or parallel_state.get_context_parallel_group()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """query [Sq, B, heads, D], key and value [Sk, B, groups, D] of this rank -> [Sq, B, heads * D].

        `attention_mask`: bool, True where attention is forbidden, broadcast to [B, heads, Sq, Sk] (Sk of all
        ranks under context parallelism), taken as it is; None means causal, or everything where the mask
        type is not causal.

        With `packed_seq_params` the row's samples do not see each other, and the mask is not looked at: query
        [T, heads, D], key and value [T, groups, D] -> [T, heads * D], zero where a token is padding. Raises
        InputError for packed sequences under context parallelism, of another format, or with a bias.
        """
        kind = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        if packed_seq_params is None:
            return self._attend(query, key, value, kind, attention_mask, attention_bias)
        packing.check(packed_seq_params, self.config.context_parallel_size)
        if attention_bias is not None:
            raise InputError("an attention bias cannot go with packed sequences; legal is None")
        return self._packed(query, key, value, kind, packed_seq_params)

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, kind: AttnMaskType, packed: Any) -> Tensor:
        parts, end = [], 0
        for at, keys in packing.segments(packed):
            out = self._attend(query[at, None], key[keys, None], value[keys, None], kind, None, None)
            parts += [_zeros(query, value, at.start - end), out.squeeze(1)]
            end = at.stop
        return torch.cat([*parts, _zeros(query, value, query.shape[0] - end)])

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kind: AttnMaskType,
        attention_mask: Tensor | None,
        attention_bias: Tensor | None,
    ) -> Tensor:
        if self.context is not None:
            key, value = _whole(key, self.context), _whole(value, self.context)
        mask, causal = self._mask(query, key.shape[0], kind, attention_mask)
        if attention_bias is not None:
            if causal:
                mask, causal = _window(self._positions(query, key.shape[0]), key.shape[0], (-1, 0)), False
            mask = _with_bias(attention_bias.to(query.dtype), mask)
        p = self.dropout if self.training else 0.0
        with self._random(p):
            out = F.scaled_dot_product_attention(
                query.permute(1, 2, 0, 3),  # views: SDPA wants [B, heads, S, D], in any strides
                key.permute(1, 2, 0, 3),
                value.permute(1, 2, 0, 3),
                attn_mask=mask,
                dropout_p=p,
                is_causal=causal,
                scale=self.softmax_scale,
                enable_gqa=query.shape[2] != key.shape[2],
            )
        return out.permute(2, 0, 1, 3).flatten(2)

    def _mask(self, query: Tensor, keys: int, kind: AttnMaskType, given: Tensor | None) -> tuple[Tensor | None, bool]:
        """What SDPA wants: True where attention is allowed, or None and whether it is causal."""
        if self.window is not None and (keys > self.window[0] >= 0 or kind not in CAUSAL):
            return _window(self._positions(query, keys), keys, self.window), False
        if given is not None:
            return ~given if given.dtype is torch.bool else given < 0.5, False
        if kind not in CAUSAL or query.shape[0] == 1:
            return None, False
        if query.shape[0] == keys:
            return None, True
        return _window(self._positions(query, keys), keys, (-1, 0)), False

    def _positions(self, query: Tensor, keys: int) -> Tensor:
        """[Sq]: where the queries stand among the keys; behind a cache they are the last."""
        if self.context is not None:
            return _places(keys, self.context.size(), query.device)[self.context.rank()]
        return torch.arange(keys - query.shape[0], keys, device=query.device)

    def _random(self, p: float) -> contextlib.AbstractContextManager[Any]:
        """Under tensor parallelism each rank drops its own heads' probabilities."""
        if not p or self.config.sequence_parallel:
            return contextlib.nullcontext()
        return get_cuda_rng_tracker().fork()

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        """Nothing, as of Transformer Engine's."""
        return {}


def _zeros(query: Tensor, value: Tensor, tokens: int) -> Tensor:
    return query.new_zeros(tokens, query.shape[-2] * value.shape[-1])


def _places(length: int, ranks: int, device: torch.device) -> Tensor:
    """[ranks, length / ranks]: the positions that each context-parallel rank holds."""
    chunks = torch.arange(length, device=device).view(2 * ranks, -1)
    return torch.cat([chunks[:ranks], chunks[ranks:].flip(0)], dim=1)


def _whole(x: Tensor, group: Any) -> Tensor:
    """[S/cp, ...] of each rank -> [S, ...] in the sequence's order; gradients are summed over the ranks."""
    gathered = gather_from_sequence_parallel_region(x.contiguous(), group=group)
    places = _places(gathered.shape[0], group.size(), x.device)
    return gathered.index_select(0, places.flatten().argsort())


def _window(positions: Tensor, keys: int, window: tuple[int, ...]) -> Tensor:
    """[Sq, keys], True where a query sees a key; `window`: keys to the left and to the right, -1 for all."""
    distance = torch.arange(keys, device=positions.device) - positions[:, None]
    left, right = window
    seen = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        seen &= distance >= -left
    return seen & (distance <= right) if right >= 0 else seen


def _with_bias(bias: Tensor, mask: Tensor | None) -> Tensor:
    """An additive mask: SDPA takes one or the other."""
    return bias if mask is None else bias.masked_fill(~mask, float("-inf"))
