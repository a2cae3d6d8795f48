"""DeepSeek V3: Moonlight and all that transformers loads as DeepseekV3ForCausalLM, without multi-token prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from nemo_minitron.artifacts.json_types import HfConfig, JsonFields, JsonObject
from nemo_minitron.errors import InputError
from nemo_minitron.families.deepseek import DEFAULTS, FIXED, MLP, Deepseek


class DeepseekV3(Deepseek):
    model_type = "deepseek_v3"
    hf_class = "DeepseekV3ForCausalLM"
    nemo_class = "DeepSeekV3Config"
    tensors: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **Deepseek.tensors,
        f"{MLP}gate.e_score_correction_bias": ("layers.{i}.router.expert_bias",),
    }
    defaults: ClassVar[JsonFields] = DEFAULTS | {
        "first_k_dense_replace": 3, "hidden_size": 7168, "intermediate_size": 18432, "max_position_embeddings": 4096,
        "moe_intermediate_size": 2048, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
        "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
        "routed_scaling_factor": 2.5, "topk_group": 4, "vocab_size": 129280,
    }  # fmt: skip
    nemo_fixed: ClassVar[JsonFields] = FIXED | {
        "moe_router_score_function": "sigmoid", "moe_router_pre_softmax": False, "moe_router_enable_expert_bias": True,
    }  # fmt: skip
    only: ClassVar[JsonFields] = {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)}
    score, of_group = "sigmoid", 2

    def features(self, config: HfConfig) -> JsonObject:
        normalized, topk = self.value(config, "norm_topk_prob"), self.value(config, "num_experts_per_tok")
        if bool(normalized) != (topk != 1):
            raise InputError(
                f"the config's norm_topk_prob is {normalized!r} with num_experts_per_tok {topk!r}; Megatron normalizes "
                "the scores of several experts, and of one it does not"
            )
        return super().features(config) | {"moe_router_enable_expert_bias": True}
