"""Nemotron: Nemotron-3, Nemotron-4, Minitron and all that transformers loads as NemotronForCausalLM.

It has LayerNorm with a bias, whose weight both Hugging Face and NeMo store minus 1 (LayerNorm1P); a plain MLP with
squared ReLU; rotary positions on a part of each head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from nemo_minitron.artifacts.json_types import HfConfig, JsonFields, JsonObject
from nemo_minitron.families.base import Family
from nemo_minitron.families.stored import LLAMA_TENSORS, biases, biases_of
from nemo_minitron.families.translate import fixed

_NORMS = (name for name in LLAMA_TENSORS if "norm" in name)


class Nemotron(Family):
    model_type = "nemotron"
    hf_class = "NemotronForCausalLM"
    nemo_model = "NemotronModel"
    nemo_class = "NemotronConfig"
    tensors = LLAMA_TENSORS | biases_of(_NORMS) | biases("q", "k", "v", "o", "up", "down")
    defaults: ClassVar[JsonFields] = {
        "hidden_act": "relu2",
        "initializer_range": 0.0134,
        "max_position_embeddings": 4096,
        "norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "rope_theta": 10000.0,
    }
    nemo_fields: ClassVar[Mapping[str, str]] = {
        "init_method_std": "initializer_range",
        "layernorm_epsilon": "norm_eps",
        "rotary_base": "rope_theta",
        "rotary_percent": "partial_rotary_factor",
        "seq_length": "max_position_embeddings",
    }
    nemo_fixed = fixed(
        "add_bias_linear",
        "rotary_percent",
        gated_linear_unit=False,
        layernorm_zero_centered_gamma=True,
        normalization="LayerNorm",
    )
    rope_types = ("default",)  # transformers reads no other kind
    reads = frozenset({"attention_bias", "mlp_bias"})

    def features(self, config: HfConfig) -> JsonObject:
        attention, mlp = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
        with_bias = {"qkv_bias": attention, "attention_output_bias": attention, "mlp_bias": mlp}
        return super().features(config) | with_bias | {"gated_mlp": False, "normalization": "layernorm"}

    def from_nemo(self, fields: JsonFields) -> JsonObject:
        biases_of_config = dict.fromkeys(("attention_bias", "mlp_bias"), bool(fields["add_bias_linear"]))
        return super().from_nemo(fields) | biases_of_config
