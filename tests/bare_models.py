"""Pico GPTModels of bare Megatron, for the tests of every room: each kind has what the others lack.

    start(tp=2)                                # this process's layout; torch.distributed is initialised before
    chunks = build("mla", sequence_parallel=True)
    save_bare(chunks, folder)                  # once, in any layout
    load_bare(chunks, folder)                  # in every other layout: the same weights, resharded by Megatron

`nemo_minitron.backend.setup()` comes before. Sizes divide by a tensor-parallel size of 2 and 4; for 3 override
`num_attention_heads=6, num_query_groups=3`. Scripts that save need `if __name__ == "__main__"`: a save may start
a helper process.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.activations import squared_relu
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.mamba import MambaModel
from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from ranks import leave_layout

VOCAB, PADDED, SEQUENCE = 509, 516, 24  # the true vocabulary is prime; a multiple of 12 is built

SIZES: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 48,
    "ffn_hidden_size": 60,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "kv_channels": 8,
    "layernorm_epsilon": 3e-5,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "add_bias_linear": False,
    "pipeline_dtype": torch.float32,
    "deallocate_pipeline_outputs": True,  # from here on as NeMo's contexts have it; `setup` turns off what needs CUDA
    "apply_rope_fusion": True,
    "persist_layer_norm": True,
    "masked_softmax_fusion": True,
    "bias_dropout_fusion": True,
}
GATED = {"normalization": "RMSNorm", "gated_linear_unit": True, "activation_func": F.silu}
MOE = {
    **GATED,
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 20,
    "moe_shared_expert_intermediate_size": 28,
    "moe_layer_freq": [0, 1, 1, 1],
    "moe_router_load_balancing_type": "none",
    "moe_aux_loss_coeff": 0.0,
    "moe_grouped_gemm": True,
    "moe_permute_fusion": True,
    "moe_token_dispatcher_type": "alltoall",
}
SIGMOID = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_pre_softmax": True,
    "moe_router_topk_scaling_factor": 1.7,
}
MLA = {
    **GATED,
    "num_query_groups": None,
    "qk_layernorm": True,
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 6,
    "rotary_base": 5000,
    "rotary_scaling_factor": 4,
    "original_max_position_embeddings": 8,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
}
SINKS = {
    **MOE,
    "activation_func": quick_gelu,
    "activation_func_clamp_value": 1.5,
    "add_bias_linear": True,
    "glu_linear_offset": 1.0,
    "moe_shared_expert_intermediate_size": None,
    "softmax_type": "learnable",
    "window_attn_skip_freq": [1, 0, 1, 0],
    "window_size": [7, 0],
}
HYBRID = {
    "normalization": "RMSNorm",
    "activation_func": squared_relu,
    "mamba_num_heads": 8,
    "mamba_head_dim": 6,
    "mamba_num_groups": 4,
    "mamba_state_dim": 5,
    "is_hybrid_model": True,
}
PATTERN, CHUNK = "M-*M", 7  # Mamba, MLP and attention; positions that the scan takes together, fewer than a sample has
PLAIN = {"normalization": "LayerNorm", "layernorm_zero_centered_gamma": True, "add_bias_linear": True}
KINDS: dict[str, dict[str, Any]] = {
    "llama": GATED,
    "qk_norm": {**GATED, "qk_layernorm": True},
    "nemotron": {**PLAIN, "add_qkv_bias": True, "activation_func": squared_relu},
    "gpt": {**PLAIN, "layernorm_zero_centered_gamma": False, "activation_func": F.gelu},
    "moe": MOE,
    "mla": MLA,
    "mla_moe": {**MLA, **MOE, **SIGMOID},  # DeepSeek-V3's kind
    "sinks": SINKS,  # gpt-oss's kind
    "hybrid": HYBRID,  # Nemotron-H's kind
}


def start(tp: int = 1, pp: int = 1, vp: int = 1, cp: int = 1, ep: int = 1, etp: int | None = None) -> None:
    """Megatron's groups for this layout, and its seeds (1); ends the layout before it. `etp`: None is `tp`."""
    leave_layout()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vp if vp > 1 else None,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def config(kind: str, **overrides: Any) -> TransformerConfig:
    """The config of a kind in the layout that `start` made; `overrides` are its fields."""
    vp = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    layout = {
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline_model_parallel_size": vp,
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size(),
    }
    cls = MLATransformerConfig if "kv_lora_rank" in KINDS[kind] else TransformerConfig
    return cls(**{**SIZES, **KINDS[kind], **layout, **overrides})


def build(kind: str, *, tied: bool = False, **overrides: Any) -> list[GPTModel]:
    """This rank's chunks (one, but for virtual stages), fp32, with random norms and biases.

    Shards are initialised by their layout: for the same weights everywhere, `load_bare` them.
    """
    made = config(kind, **overrides)
    stages = range(made.virtual_pipeline_model_parallel_size or 1)
    return [_chunk(made, tied, stage if len(stages) > 1 else None) for stage in stages]


def _chunk(made: TransformerConfig, tied: bool, vp_stage: int | None) -> GPTModel | MambaModel:
    built = _hybrid(made, tied) if made.is_hybrid_model else _gpt(made, tied, vp_stage)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in built.named_parameters():  # ones and zeros would hide what happens to them
            if name.endswith("router.bias"):
                parameter.zero_()  # Megatron-core 0.15 leaves it as the memory was, at times NaN
            if "norm" in name or name.endswith(("bias", ".D", "softmax_offset")):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in built.named_buffers():
            if name.endswith("expert_bias"):
                buffer.add_(0.2 * torch.randn(buffer.shape, generator=generator))
    return built


def _hybrid(made: TransformerConfig, tied: bool) -> MambaModel:
    spec = copy.deepcopy(mamba_stack_spec)
    spec.submodules.mamba_layer.submodules.mixer.params = {"chunk_size": CHUNK}
    return MambaModel(
        config=made,
        mamba_stack_spec=spec,
        vocab_size=PADDED,
        max_sequence_length=SEQUENCE,
        hybrid_override_pattern=PATTERN,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=tied,
    )


def _gpt(made: TransformerConfig, tied: bool, vp_stage: int | None) -> GPTModel:
    mla = isinstance(made, MLATransformerConfig)
    return GPTModel(
        config=made,
        transformer_layer_spec=get_gpt_decoder_block_spec(made, use_transformer_engine=True, vp_stage=vp_stage),
        vocab_size=PADDED,
        max_sequence_length=SEQUENCE,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        position_embedding_type="none" if mla else "rope",  # multi-latent attention has its own
        rotary_base=5000,
        share_embeddings_and_output_weights=tied,
        vp_stage=vp_stage,
    )


def tokens(rows: int, seed: int = 7, length: int = SEQUENCE) -> torch.Tensor:
    """int64 [rows, length] of the true vocabulary."""
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


# -- checkpoints -------------------------------------------------------------------------------------------
def sharded(chunks: GPTModel | list[GPTModel]) -> dict[str, Any]:
    """Megatron's sharded state dict of this rank's chunks; keys of tensors do not depend on the layout."""
    metadata = {"non_homogeneous_layers": True}
    return {f"model{i}": chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(_list(chunks))}


def save_bare(chunks: GPTModel | list[GPTModel], folder: str | Path) -> None:
    """Writes a torch_dist checkpoint; every rank calls it, and it returns when all are done."""
    if torch.distributed.get_rank() == 0:
        Path(folder).mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save(sharded(chunks), str(folder))
    torch.distributed.barrier()


def load_bare(chunks: GPTModel | list[GPTModel], folder: str | Path) -> None:
    """Fills this rank's shards from a checkpoint of any layout; every rank calls it."""
    state = dist_checkpointing.load(sharded(chunks), str(folder))
    for i, chunk in enumerate(_list(chunks)):
        chunk.load_state_dict(state[f"model{i}"])


def _list(chunks: GPTModel | list[GPTModel]) -> list[GPTModel]:
    return chunks if isinstance(chunks, list) else [chunks]
