"""Qwen3 (dense): all that transformers loads as Qwen3ForCausalLM: norms of queries and keys, head_dim of its own."""

from __future__ import annotations

from nemo_minitron.artifacts.json_types import HfConfig, JsonFields, JsonObject
from nemo_minitron.families.base import NEMO_FIELDS, Family
from nemo_minitron.families.qwen2 import Qwen2
from nemo_minitron.families.stored import LLAMA_TENSORS, biases
from nemo_minitron.families.translate import fixed

_ATTENTION = "model.layers.{i}.self_attn."


class Qwen3(Qwen2):
    model_type = "qwen3"
    hf_class = "Qwen3ForCausalLM"
    nemo_model = "Qwen3Model"
    nemo_class = "Qwen3Config"
    tensors = LLAMA_TENSORS | biases("q", "k", "v", "o") | {
        f"{_ATTENTION}q_norm.weight": ("layers.{i}.q_norm.weight",),
        f"{_ATTENTION}k_norm.weight": ("layers.{i}.k_norm.weight",),
    }  # fmt: skip
    defaults = Qwen2.defaults | {"head_dim": 128}
    nemo_fields = NEMO_FIELDS | {"max_position_embeddings": "max_position_embeddings"}
    nemo_fixed = fixed("window_size", "window_attn_skip_freq", "seq_len_interpolation_factor", qk_layernorm=True)
    reads = Qwen2.reads | {"attention_bias"}

    def features(self, config: HfConfig) -> JsonObject:
        attention = bool(config.get("attention_bias"))
        own_features = {"qk_norm": True, "qkv_bias": attention, "attention_output_bias": attention}
        return Family.features(self, config) | own_features

    def from_nemo(self, fields: JsonFields) -> JsonObject:
        return super().from_nemo(fields) | {"attention_bias": False}
