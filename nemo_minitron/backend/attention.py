"""Core attention by torch's scaled_dot_product_attention, in the place of Transformer Engine's.

With attention sinks (`sinks.py`) each head has a learned logit of its own beside its scores.

Shapes (docs/shapes.md): S positions of the queries, P positions of keys and values, N tokens of packed sequences, B
sequences, A attention heads, G query groups, Y channels of one head, R ranks of context parallelism, X further
dimensions.
"""

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

from nemo_minitron.backend import packing, sinks
from nemo_minitron.errors import InputError

CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)


class Attention(MegatronModule):
    """softmax(Q K^T * scale) V, the same numbers as Megatron's unfused DotProductAttention.

    Rotary embedding and QK norm come before it. Its only parameter is `softmax_offset` [A/tp], the heads' sinks, of a
    model that has them (Megatron's softmax type "learnable"). `softmax_scale` defaults to 1/sqrt(head_dim).
    Megatron's query-key layer scaling divides and multiplies by the same number, so it is left out. Under context
    parallelism each rank gathers all keys and values, in Megatron's order of the sequence (each rank has two chunks,
    one from either end). Raises InputError for another softmax type.
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
        self.softmax_offset = sinks.parameter(config)
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
        """query [S, B, A, Y], key and value [P, B, G, Y] of this rank -> [S, B, A * Y].

        `attention_mask`: bool, True where attention is forbidden, broadcast to [B, A, S, P] (P of all ranks under
        context parallelism). It is used as it is. None: causal, or no mask if the mask type is not causal.

        With `packed_seq_params` the samples of a row do not see each other, and the mask is ignored: query [N, A, Y],
        key and value [N, G, Y] -> [N, A * Y], zero where a token is padding. Raises InputError for packed sequences
        under context parallelism, in another format, or with a bias.
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
            key, value = _gather_sequence(key, self.context), _gather_sequence(value, self.context)
        mask, causal = self._mask(query, key.shape[0], kind, attention_mask)
        if attention_bias is not None:
            if causal:
                mask, causal = _window(self._positions(query, key.shape[0]), key.shape[0], (-1, 0)), False
            mask = _with_bias(attention_bias.to(query.dtype), mask)
        p = self.dropout if self.training else 0.0
        if self.softmax_offset is not None:
            if causal:
                mask = _window(self._positions(query, key.shape[0]), key.shape[0], (-1, 0))
            with self._random(p):
                return sinks.attend(query, key, value, self.softmax_offset, mask, self.softmax_scale, p)
        with self._random(p):
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # views: SDPA takes any strides
            out = self._product(q, k, v, mask, causal, p)
        return out.permute(2, 0, 1, 3).flatten(2)

    def _product(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, p: float
    ) -> Tensor:
        """query [B, A, S, Y], key and value [B, G, P, Y] -> [B, A, S, Y]; `p`: the dropout of probabilities."""
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=p, is_causal=causal, scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip

    def _mask(self, query: Tensor, keys: int, kind: AttnMaskType, given: Tensor | None) -> tuple[Tensor | None, bool]:
        """SDPA's mask, True where attention is allowed, and False; or None, and whether attention is causal."""
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
        """[S]: the positions of the queries among the keys. Behind a cache the queries are the last positions."""
        if self.context is not None:
            return _places(keys, self.context.size(), query.device)[self.context.rank()]
        return torch.arange(keys - query.shape[0], keys, device=query.device)

    def _random(self, p: float) -> contextlib.AbstractContextManager[Any]:
        """The random generator of dropout. Under tensor parallelism each rank drops its own heads' probabilities."""
        if not p or self.config.sequence_parallel:
            return contextlib.nullcontext()
        return get_cuda_rng_tracker().fork()

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        """The sinks, shards of the heads; nothing of a model without them, as for Transformer Engine's attention."""
        return sinks.sharded(self, prefix, sharded_offsets)


def _zeros(query: Tensor, value: Tensor, tokens: int) -> Tensor:
    return query.new_zeros(tokens, query.shape[-2] * value.shape[-1])


def _places(length: int, ranks: int, device: torch.device) -> Tensor:
    """[R, S]: the positions that each context-parallel rank holds."""
    chunks = torch.arange(length, device=device).view(2 * ranks, -1)
    return torch.cat([chunks[:ranks], chunks[ranks:].flip(0)], dim=1)


def _gather_sequence(x_SX: Tensor, group: Any) -> Tensor:
    """[P, ...]: the positions of all ranks, in the sequence's order. Gradients are summed over the ranks."""
    gathered_PX = gather_from_sequence_parallel_region(x_SX.contiguous(), group=group)
    positions_RS = _places(gathered_PX.shape[0], group.size(), x_SX.device)
    return gathered_PX.index_select(0, positions_RS.flatten().argsort())


def _window(positions_S: Tensor, keys: int, window: tuple[int, ...]) -> Tensor:
    """bool [S, P], True where a query sees a key. `window`: keys to the left and to the right, -1 for all."""
    distance_SP = torch.arange(keys, device=positions_S.device) - positions_S[:, None]
    left, right = window
    seen_SP = torch.ones_like(distance_SP, dtype=torch.bool)
    if left >= 0:
        seen_SP &= distance_SP >= -left
    return seen_SP & (distance_SP <= right) if right >= 0 else seen_SP


def _with_bias(bias: Tensor, mask: Tensor | None) -> Tensor:
    """Bias and mask as one additive mask: SDPA takes only one of the two."""
    return bias if mask is None else bias.masked_fill(~mask, float("-inf"))
