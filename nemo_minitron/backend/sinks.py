"""Attention sinks: each head's learned logit beside its scores, which takes a share of the softmax and adds nothing.

Shapes (docs/shapes.md): S positions of the queries, P positions of keys and values, B sequences, A attention heads, G
query groups, Y channels of one head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from nemo_minitron.backend.norms import device_of
from nemo_minitron.errors import InputError

TYPES = ("vanilla", "learnable")


def parameter(config: Any) -> nn.Parameter | None:
    """The sinks [A/tp] of this rank's heads, zeros in `params_dtype`; None of a model without them.

    Raises InputError for a softmax type that is neither."""
    kind = getattr(config, "softmax_type", TYPES[0])
    if kind not in TYPES:
        raise InputError(f"softmax_type '{kind}' needs Transformer Engine; legal are {' and '.join(TYPES)}")
    if kind == TYPES[0]:
        return None
    heads = config.num_attention_heads // config.tensor_model_parallel_size
    sinks_A = nn.Parameter(torch.zeros(heads, dtype=config.params_dtype, device=device_of(config)))
    set_tensor_model_parallel_attributes(sinks_A, True, 0, 1)
    return sinks_A


def attend(
    query: Tensor, key: Tensor, value: Tensor, sinks_A: Tensor, mask: Tensor | None, scale: float | None, dropout: float
) -> Tensor:
    """query [S, B, A, Y], key and value [P, B, G, Y] -> [S, B, A * Y], in the query's dtype.

    `mask`: bool, True where attention is allowed, or what is added to the scores; broadcast to [B, A, S, P].
    Scores and softmax are in fp32 (fp64 stays fp64), as in Transformer Engine."""
    wide, shared = torch.promote_types(query.dtype, torch.float32), query.shape[2] // key.shape[2]
    q_BASY = query.permute(1, 2, 0, 3).to(wide)
    k_BAPY, v_BAPY = (x.permute(1, 2, 0, 3).repeat_interleave(shared, 1).to(wide) for x in (key, value))
    scores_BASP = q_BASY @ k_BAPY.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores_BASP = scores_BASP.masked_fill(~mask, float("-inf")) if mask.dtype is torch.bool else scores_BASP + mask
    column = sinks_A.to(wide).view(1, -1, 1, 1).expand(*scores_BASP.shape[:3], 1)
    weights_BASP = torch.cat([scores_BASP, column], dim=-1).softmax(-1)[..., :-1]
    out_BASY = F.dropout(weights_BASP, dropout) @ v_BAPY
    return out_BASY.permute(2, 0, 1, 3).flatten(2).to(query.dtype)


def sharded(attention: nn.Module, prefix: str, offsets: tuple) -> dict:
    """The parameter in Megatron's form for a checkpoint: split over the heads."""
    state = attention.state_dict(prefix="", keep_vars=True)
    return make_sharded_tensors_for_checkpoint(state, prefix, {"softmax_offset": 0}, offsets)
