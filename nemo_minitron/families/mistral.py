"""Mistral: Mistral 7B, Mistral-NeMo and all that transformers loads as MistralForCausalLM."""

from __future__ import annotations

from nemo_minitron.artifacts.json_types import HfConfig, JsonFields, JsonObject
from nemo_minitron.families.base import LLAMA_DEFAULTS, Family
from nemo_minitron.families.keys import layer_types
from nemo_minitron.families.translate import fixed, hf_window, nemo_window


class Mistral(Family):
    model_type = "mistral"
    hf_class = "MistralForCausalLM"
    nemo_model = "MistralModel"
    nemo_class = "MistralConfig7B"
    defaults = LLAMA_DEFAULTS | {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    }
    nemo_fixed = fixed("window_size", "seq_len_interpolation_factor")
    reads = frozenset({"layer_types"})  # transformers loads a Mistral that has layer_types as a Ministral

    def windows(self, config: HfConfig) -> JsonObject:
        kinds = layer_types(config) if "layer_types" in self.read else []
        return nemo_window(self.value(config, "sliding_window"), kinds)

    def claims(self, fields: JsonFields) -> bool:
        return fields.get("window_attn_skip_freq") is None

    def from_nemo(self, fields: JsonFields) -> JsonObject:
        return super().from_nemo(fields) | hf_window(fields)
