"""Pico GPTModels of bare Megatron, by the layer spec that names Transformer Engine."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer import TransformerConfig

VOCAB, SEQUENCE = 60, 12

# Each kind has what the others lack: QK norm, a zero-centred gamma, biases, a mixture of experts.
KINDS = {
    "rms": {"normalization": "RMSNorm", "gated_linear_unit": True, "activation_func": F.silu, "qk_layernorm": True},
    "layer": {"normalization": "LayerNorm", "layernorm_zero_centered_gamma": True, "add_qkv_bias": True},
    "moe": {
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 20,
        "moe_aux_loss_coeff": 0.0,
        "moe_router_load_balancing_type": "none",
        "moe_grouped_gemm": True,
        "moe_token_dispatcher_type": "alltoall",
        "moe_permute_fusion": True,
    },
}


def config(kind: str, **overrides) -> TransformerConfig:
    """With Transformer Engine's fusions on, as a NeMo context has them; `setup` turns them off."""
    fields = {
        "num_layers": 4,
        "hidden_size": 24,
        "ffn_hidden_size": 40,
        "num_attention_heads": 6,
        "num_query_groups": 2,
        "kv_channels": 8,
        "layernorm_epsilon": 3e-5,
        "add_bias_linear": kind == "layer",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "apply_rope_fusion": True,
        "persist_layer_norm": True,
        "masked_softmax_fusion": True,
        "bias_dropout_fusion": True,
        "pipeline_dtype": torch.float32,
        "deallocate_pipeline_outputs": True,  # as NeMo's configs have it
    }
    return TransformerConfig(**{**fields, **KINDS[kind], **overrides})


def layer_spec(made: TransformerConfig):
    return get_gpt_layer_with_transformer_engine_spec(
        num_experts=made.num_moe_experts, moe_grouped_gemm=made.moe_grouped_gemm, qk_layernorm=made.qk_layernorm
    )


def model(made: TransformerConfig, *, tied: bool = True, vp_stage: int | None = None) -> GPTModel:
    """One chunk of this rank; norms and biases get random values, which ones and zeros would hide."""
    built = GPTModel(
        config=made,
        transformer_layer_spec=layer_spec(made),
        vocab_size=VOCAB,
        max_sequence_length=SEQUENCE,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        position_embedding_type="rope",
        rotary_base=5000,
        share_embeddings_and_output_weights=tied,
        vp_stage=vp_stage,
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return built
