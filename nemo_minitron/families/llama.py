"""Llama: Llama 2 to 3.2, SmolLM2 and all that transformers loads as LlamaForCausalLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_minitron.errors import InputError
from nemo_minitron.families.base import LLAMA_SIZES, LLAMA_TENSORS, Config, Family, nemo_sizes

_BIASES = {
    f"model.layers.{{i}}.{module}.bias": (f"layers.{{i}}.{tensor}.bias",)
    for module, tensor in {
        "self_attn.q_proj": "q",
        "self_attn.k_proj": "k",
        "self_attn.v_proj": "v",
        "self_attn.o_proj": "o",
        "mlp.gate_proj": "gate",
        "mlp.up_proj": "up",
        "mlp.down_proj": "down",
    }.items()
}
_LLAMA3_ROPE = {  # NeMo's Llama31Config field -> Hugging Face's rope_scaling field
    "scale_factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "old_context_len": "original_max_position_embeddings",
}
NEMO_FIELDS = {  # NeMo's GPTConfig field -> Hugging Face field
    "init_method_std": "initializer_range",
    "layernorm_epsilon": "rms_norm_eps",
    "seq_length": "max_position_embeddings",
    "rotary_base": "rope_theta",
}
NEMO_DEFAULTS = {  # transformers' own, where a config is silent
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
}


class Llama(Family):
    model_type = "llama"
    hf_class = "LlamaForCausalLM"
    nemo_model = "LlamaModel"
    tensors = LLAMA_TENSORS | _BIASES

    def features(self, config: Config) -> dict[str, Any]:
        attention, mlp = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
        biases = {"qkv_bias": attention, "attention_output_bias": attention, "mlp_bias": mlp}
        return super().features(config) | biases

    def nemo_config(self, config: Config) -> tuple[str, dict[str, Any]]:
        architecture = self.architecture(config)
        if architecture.qkv_bias != architecture.mlp_bias:
            raise InputError("Megatron has biases in attention and MLP, or in neither; this Llama has them in one")
        fields = nemo_sizes(architecture) | common_fields(config) | {"add_bias_linear": architecture.mlp_bias}
        rope = config.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "llama3":
            return "Llama31Config", fields | {name: rope[key] for name, key in _LLAMA3_ROPE.items()}
        if kind == "linear":
            fields["seq_len_interpolation_factor"] = float(rope["factor"])
        elif kind != "default":
            raise InputError(f"rope_scaling '{kind}' is not in NeMo's Llama; it has llama3, linear and default")
        return "LlamaConfig", fields

    def from_nemo(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        config = common_config(self, fields)
        config |= {"attention_bias": bool(fields["add_bias_linear"]), "mlp_bias": bool(fields["add_bias_linear"])}
        if fields.get("old_context_len"):
            config["rope_scaling"] = {"rope_type": "llama3"}
            config["rope_scaling"] |= {key: fields[name] for name, key in _LLAMA3_ROPE.items()}
        elif fields.get("seq_len_interpolation_factor"):
            config["rope_scaling"] = {"rope_type": "linear", "factor": fields["seq_len_interpolation_factor"]}
        return config


def common_fields(config: Config) -> dict[str, Any]:
    """What Llama-like families hand to NeMo besides sizes. Raises InputError for another activation."""
    if config.get("hidden_act", "silu") != "silu":
        raise InputError(f"hidden_act '{config['hidden_act']}' is not NeMo's for this family; it has silu")
    return {name: config.get(key, NEMO_DEFAULTS[key]) for name, key in NEMO_FIELDS.items()}


def common_config(family: Family, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The Hugging Face config that a NeMo config of a Llama-like family stands for."""
    sizes = {name: fields[NEMO_SIZES[size]] for size, name in LLAMA_SIZES.items()}
    if sizes["head_dim"] is None:
        sizes["head_dim"] = sizes["hidden_size"] // sizes["num_attention_heads"]
    return {
        "architectures": [family.hf_class],
        "model_type": family.model_type,
        "hidden_act": "silu",
        "tie_word_embeddings": bool(fields["share_embeddings_and_output_weights"]),
        **sizes,
        **{key: fields[name] for name, key in NEMO_FIELDS.items()},
    }


NEMO_SIZES = {size: size for size in LLAMA_SIZES} | {"head_dim": "kv_channels"}
