"""Qwen2-MoE: Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B and all that transformers loads as Qwen2MoeForCausalLM.

As Qwen3-MoE, with biases in q, k and v in place of their norms, and with a shared expert in each mixture. The shared
expert takes every token; what it gives is multiplied by the sigmoid of one number a token, its gate.

transformers 4 and 5 read a config's windows in two ways, so windows are refused. transformers 4 and vLLM run the
class only where heads times head_dim are the hidden size; transformers 5 runs every size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts.json_types import HfConfig, JsonFields, JsonObject
from nemo_minitron.errors import InputError
from nemo_minitron.families.base import Family
from nemo_minitron.families.qwen3_moe import MIXTURE, MLP, Qwen3Moe
from nemo_minitron.families.stored import LLAMA_TENSORS, biases
from nemo_minitron.families.translate import fixed, nemo_window

_SHARED = f"{MLP}shared_expert"


class Qwen2Moe(Qwen3Moe):
    model_type = "qwen2_moe"
    hf_class = "Qwen2MoeForCausalLM"
    hosts: ClassVar[tuple[str, ...]] = ("bridge",)
    nemo_model = "Qwen2Model"
    nemo_class = "Qwen2Config"
    tensors = (
        LLAMA_TENSORS
        | biases("q", "k", "v")
        | MIXTURE
        | {f"{_SHARED}.{n}_proj.weight": (f"layers.{{i}}.shared_expert.{n}.weight",) for n in ("gate", "up", "down")}
        | {f"{_SHARED}_gate.weight": ("layers.{i}.shared_expert.router.weight",)}
    )
    sizes = Qwen3Moe.sizes | {"moe_shared_expert_intermediate_size": "shared_expert_intermediate_size"}
    defaults = Qwen3Moe.defaults | {
        "hidden_size": 2048, "intermediate_size": 5632, "moe_intermediate_size": 1408, "num_attention_heads": 16,
        "num_experts": 60, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 16,
        "qkv_bias": True, "shared_expert_intermediate_size": 5632, "vocab_size": 151936,
    }  # fmt: skip
    nemo_fixed = fixed(
        "num_moe_experts",
        "add_qkv_bias",
        "seq_len_interpolation_factor",
        moe_router_score_function="softmax",
        moe_router_enable_expert_bias=False,
        moe_router_num_groups=None,
        moe_router_topk_scaling_factor=None,
        moe_shared_expert_gate=True,
    )
    reads = frozenset({"mlp_only_layers", "use_sliding_window"})
    no_effect = frozenset({"max_window_layers"})  # of windows, which are refused
    exact_axes = Qwen3Moe.exact_axes | {"shared_expert_ffn"}

    def features(self, config: HfConfig) -> JsonObject:
        bias = self.value(config, "qkv_bias")
        own = {"qkv_bias": bias, "moe_shared_expert_gate": True, "moe_layer_freq": self._pattern(config)}
        return Family.features(self, config) | own

    def windows(self, config: HfConfig) -> JsonObject:
        if config.get("use_sliding_window"):
            raise InputError(
                f"the config's use_sliding_window is {config['use_sliding_window']!r}: of a {self.hf_class} "
                "transformers 4 gives every layer the window, transformers 5 every other one; legal is false"
            )
        return nemo_window(None)

    # -- sizes -----------------------------------------------------------------------------------------
    def loads(self, config: HfConfig) -> Mapping[str, int | str]:
        """As in Family; a search leaves the hidden size as it is, unless it is named."""
        sizes = self.architecture(config)
        return {**self.multiples, "hidden_size": sizes.num_attention_heads * sizes.head_dim}

    def remark(self, architecture: Architecture) -> str | None:
        a = architecture
        if a.num_attention_heads * a.head_dim != a.hidden_size:
            return (
                f"transformers 4 and vLLM run a {self.hf_class} only where heads x head_dim are the hidden size; "
                f"{a.num_attention_heads} x {a.head_dim} are not {a.hidden_size}, though transformers 5 runs it; the "
                f"nearest hidden_size is {a.num_attention_heads * a.head_dim}"
            )
        return super().remark(a)

    def unserved(self, config: HfConfig) -> dict[str, str]:
        """As in Family, read in the engines' sources. A bias that no file has would be what vLLM's memory held."""
        a, activation = self.architecture(config), self.value(config, self.activation)
        reasons = (
            (not a.qkv_bias, ("vllm", "tensorrt_llm"), "always adds biases to q, k and v, and qkv_bias is false"),
            (
                self.value(config, "norm_topk_prob"),
                ("llama_cpp",),
                "never normalizes the probabilities of a token's experts, and norm_topk_prob is true",
            ),
            (a.dense_layers, ("tensorrt_llm", "llama_cpp"), "makes a mixture of every layer, and some are dense"),
            (activation != "silu", ("vllm", "llama_cpp"), f"has silu alone, and {self.activation} is {activation}"),
        )
        found: dict[str, list[str]] = {}
        for differs, engines, why in reasons:
            for engine in engines if differs else ():
                found.setdefault(engine, []).append(why)
        return {engine: "; ".join(whys) for engine, whys in found.items()}

    # -- Megatron --------------------------------------------------------------------------------------
    def nemo_config(self, config: HfConfig) -> tuple[str, JsonObject]:
        self.architecture(config)
        raise InputError(
            f"NeMo's Megatron-core has no gate of a shared expert, which a {self.hf_class} has; Megatron-Bridge's has "
            "one: give --host bridge"
        )

    def bridge_config(self, config: HfConfig) -> JsonObject:
        return super().nemo_config(config)[1] | {"moe_shared_expert_gate": True}

    def claims(self, fields: JsonFields) -> bool:
        return bool(fields.get("num_moe_experts") and fields.get("moe_shared_expert_gate"))

    def from_nemo(self, fields: JsonFields) -> JsonObject:
        """As in Family, of a checkpoint of Bridge."""
        config = super().from_nemo(fields) | {"qkv_bias": bool(fields["add_qkv_bias"])}
        return {name: value for name, value in config.items() if name != "attention_bias"}
