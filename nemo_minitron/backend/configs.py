"""Config fields that need Transformer Engine, apex or CUDA, switched off before Megatron checks them.

Only the live config is changed. NeMo writes into a checkpoint's context what a config was constructed with (its
`__io__`, taken before `__post_init__`). So a student that was trained on a CPU runs with Transformer Engine's fusions
on a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import Any

logger = logging.getLogger(__name__)

# Fields of Megatron's configs and of NeMo's, with the value that means "off".
NEEDS_TRANSFORMER_ENGINE: dict[str, Any] = {
    "apply_rope_fusion": False,
    "fused_single_qkv_rope": False,
    "persist_layer_norm": False,
    "memory_efficient_layer_norm": False,
    "fused_residual_rmsnorm": False,  # since Megatron-core 0.19
    "cross_entropy_fusion_impl": "native",
    "tp_comm_overlap": False,
    "delay_wgrad_compute": False,
    "symmetric_ar_type": None,
    "use_te_activation_func": False,
    "use_te_rng_tracker": False,
    "use_transformer_engine_op_fuser": None,
    "use_transformer_engine_full_layer_spec": False,
    "enable_cuda_graph": False,
    "external_cuda_graph": False,
    "cuda_graph_impl": "none",
    "moe_grouped_gemm": False,
    "moe_permute_fusion": False,
    "moe_router_fusion": False,
    "fp8": None,
    "fp8_param": False,
    "fp4": None,
    "fp4_param": False,
}
NEEDS_CUDA: dict[str, Any] = {
    "masked_softmax_fusion": False,
    "cross_entropy_loss_fusion": False,
    "bias_activation_fusion": False,  # this one and the next are torch.compile'd, which costs more than it saves here
    "bias_dropout_fusion": False,
    "cpu_offloading": False,
    "moe_shared_expert_overlap": False,
    "moe_enable_deepep": False,
}
NEEDS_APEX = {"gradient_accumulation_fusion": False}  # in Megatron's linear layers, which are the base of ours
CHANGES_NUMBERS = ("fp8", "fp8_param", "fp4", "fp4_param")


def switch_off(cpu: bool, reference: bool) -> None:
    """Wraps Megatron's base config. Its `__post_init__` runs before that of every config derived from it."""
    from megatron.core.model_parallel_config import ModelParallelConfig

    off = fields_off(cpu, reference)
    original = ModelParallelConfig.__post_init__

    @functools.wraps(original)
    def checked(self: Any) -> None:
        for name, value in off.items():
            current = getattr(self, name, value)
            if current != value:
                _tell(name, current)
                setattr(self, name, value)
        if cpu and getattr(self, "moe_token_dispatcher_type", None) == "flex":  # DeepEP's
            self.moe_token_dispatcher_type = "alltoall"
        original(self)

    ModelParallelConfig.__post_init__ = checked


def fields_off(cpu: bool, reference: bool) -> dict[str, Any]:
    """The fields to switch off for these switches, each with its value for "off"."""
    off: dict[str, Any] = {}
    if reference:
        off |= NEEDS_TRANSFORMER_ENGINE
        if importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None:
            off |= NEEDS_APEX
    return off | NEEDS_CUDA if cpu else off


def _tell(name: str, value: Any) -> None:
    if name in CHANGES_NUMBERS:
        logger.warning("%s=%r needs Transformer Engine on a GPU; it is off here", name, value)
