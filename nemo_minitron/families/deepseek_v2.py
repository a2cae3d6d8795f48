"""DeepSeek V2: V2-Lite and all that transformers loads as DeepseekV2ForCausalLM; `deepseek.py` has what V3 has, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts.json_types import HfConfig, JsonFields, JsonObject
from nemo_minitron.errors import InputError
from nemo_minitron.families.deepseek import DEFAULTS, FIXED, Deepseek


class DeepseekV2(Deepseek):
    model_type = "deepseek_v2"
    hf_class = "DeepseekV2ForCausalLM"
    nemo_class = "DeepSeekV2Config"
    defaults: ClassVar[JsonFields] = DEFAULTS | {
        "first_k_dense_replace": 0, "hidden_size": 4096, "intermediate_size": 11008, "moe_intermediate_size": 1407,
        "n_group": None, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False,
        "num_attention_heads": 32, "num_hidden_layers": 32, "routed_scaling_factor": 1.0, "topk_group": None,
        "topk_method": "greedy", "vocab_size": 32000,
    }  # fmt: skip
    nemo_fixed: ClassVar[JsonFields] = FIXED | {
        "moe_router_score_function": "softmax", "moe_router_pre_softmax": True, "moe_router_enable_expert_bias": False,
    }  # fmt: skip
    # transformers' class does not read norm_topk_prob, DeepSeek's code does
    only: ClassVar[JsonFields] = {
        "norm_topk_prob": (False,), "scoring_func": ("softmax",), "topk_method": ("greedy", "group_limited_greedy"),
    }  # fmt: skip
    multiples: ClassVar[Mapping[str, int | str]] = {
        **Deepseek.multiples,
        "hidden_size": "num_attention_heads",
    }
    score, of_group = "softmax", 1

    def config(self, architecture: Architecture, base: HfConfig, layers: Sequence[int] | None = None) -> JsonObject:
        """As in Deepseek. transformers takes the rotary channels, which lie behind the latent, for complex numbers."""
        if (latent := architecture.kv_lora_rank or 0) % 2:
            raise InputError(
                f"kv_latent={latent} is odd, which transformers' {self.hf_class} cannot run; the nearest legal "
                f"kv_latent is {latent + 1}"
            )
        return super().config(architecture, base, layers)

    def _grouped(self, config: HfConfig) -> bool:
        return self.value(config, "topk_method") == "group_limited_greedy"

    def from_nemo(self, fields: JsonFields) -> JsonObject:
        method = "group_limited_greedy" if fields["moe_router_num_groups"] else "greedy"
        return super().from_nemo(fields) | {"topk_method": method}
