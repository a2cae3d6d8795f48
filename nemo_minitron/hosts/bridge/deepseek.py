"""DeepSeek's multi-latent attention on Megatron-Bridge: a provider, and attention that computes as transformers does.

Bridge has providers for DeepSeek. Two things in Megatron-core 0.19.2 make other models of them. Without a latent of
queries its `QKNormConfigResolver` puts a norm into `linear_q_proj`, whatever the layer spec says, so that queries are
made of hidden states that are normed twice. And the norms of latents take the epsilon of the others, which is 1e-5 in
Moonlight, where transformers and DeepSeek's own code have 1e-6. So a checkpoint names this provider, and Bridge without
this package refuses it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.models.mla_provider import MLAModelProvider
from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.multi_latent_attention import MLASelfAttention

from nemo_minitron.latents import EPSILON


def layer_spec(config: DeepseekProvider, vp_stage: int | None = None) -> Any:
    """Megatron's dense layers and mixtures, with norms of the latents that stand alone and have their own epsilon."""
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
    for layer in block.layer_specs:
        attention = layer.submodules.self_attention
        attention.module, parts = LatentAttention, attention.submodules
        parts.kv_layernorm, parts.linear_kv_up_proj = latent_norm, parts.linear_q_proj  # a plain linear layer
        if config.q_lora_rank is not None:
            parts.q_layernorm, parts.linear_q_up_proj = latent_norm, parts.linear_q_proj
    return block


def latent_norm(hidden_size: int, config: Any, eps: float) -> Any:
    """The norm of a latent, in place of one with the model's epsilon `eps`."""
    return TENorm(config, hidden_size, eps=EPSILON)


class LatentAttention(MLASelfAttention):
    """Megatron's multi-latent attention, with queries of hidden states that are normed once."""

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        classes = super()._resolve_qk_norm_config(submodules)
        own = {"linear_q_proj": submodules.linear_q_proj} if self.config.q_lora_rank is None else {}
        return {**classes, **own}


@dataclasses.dataclass
class DeepseekProvider(MLAModelProvider):
    """Bridge's provider of multi-latent attention, with these layers."""

    moe_grouped_gemm: bool = True
    transformer_layer_spec: ModuleSpec | Callable[[GPTModelProvider], ModuleSpec] = layer_spec
