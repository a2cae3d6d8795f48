"""Llama: Llama 2 to 3.2, SmolLM2 and all that transformers loads as LlamaForCausalLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from nemo_minitron.artifacts.json_types import HfConfig, JsonFields, JsonObject
from nemo_minitron.families.base import Family
from nemo_minitron.families.stored import LLAMA_TENSORS, biases
from nemo_minitron.families.translate import fixed, rope_field, rope_of

_LLAMA3_ROPE = {  # NeMo's Llama31Config field -> Hugging Face's rope_scaling field
    "scale_factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "old_context_len": "original_max_position_embeddings",
}


class Llama(Family):
    model_type = "llama"
    hf_class = "LlamaForCausalLM"
    nemo_model = "LlamaModel"
    nemo_class = "LlamaConfig"
    tensors = LLAMA_TENSORS | biases("q", "k", "v", "o", "gate", "up", "down")
    nemo_fixed = fixed("add_bias_linear", "seq_len_interpolation_factor")
    rope_types = ("default", "linear", "llama3")
    reads = frozenset({"attention_bias", "mlp_bias"})
    multiples: ClassVar[Mapping[str, int | str]] = {
        "hidden_size": "num_attention_heads"
    }  # transformers' LlamaConfig checks this

    def features(self, config: HfConfig) -> JsonObject:
        attention, mlp = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
        with_bias = {"qkv_bias": attention, "attention_output_bias": attention, "mlp_bias": mlp}
        return super().features(config) | with_bias

    def nemo_config(self, config: HfConfig) -> tuple[str, JsonObject]:
        name, fields = super().nemo_config(config)
        kind, rope = rope_of(config)
        if kind == "llama3":
            return "Llama31Config", fields | {field: rope_field(rope, key) for field, key in _LLAMA3_ROPE.items()}
        return name, fields

    def claims(self, fields: JsonFields) -> bool:
        """NeMo's LlamaModel is also that of Arcee, Seed-OSS and SmolLM3."""
        gated = fields.get("gated_linear_unit", True)
        return bool(gated) and not fields.get("add_qkv_bias") and fields.get("no_rope_freq") is None

    def from_nemo(self, fields: JsonFields) -> JsonObject:
        config = super().from_nemo(fields)
        config |= dict.fromkeys(("attention_bias", "mlp_bias"), bool(fields["add_bias_linear"]))
        if fields.get("old_context_len"):
            rope = {key: fields[name] for name, key in _LLAMA3_ROPE.items()}
            config["rope_scaling"] = {"rope_type": "llama3", **rope}
        return config
