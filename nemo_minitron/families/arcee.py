"""Arcee: AFM-4.5B and all that transformers loads as ArceeForCausalLM: Llama with a plain MLP of two matrices and
squared ReLU.

NeMo has no class of its own for it: the model is NeMo's LlamaModel without `gated_linear_unit`.
"""

from __future__ import annotations

from nemo_minitron.artifacts.json_types import HfConfig, JsonFields, JsonObject
from nemo_minitron.families.base import LLAMA_DEFAULTS
from nemo_minitron.families.llama import Llama
from nemo_minitron.families.stored import LLAMA_TENSORS, biases
from nemo_minitron.families.translate import fixed, nemo_activation

_GATE = "model.layers.{i}.mlp.gate_proj.weight"


class Arcee(Llama):
    model_type = "arcee"
    hf_class = "ArceeForCausalLM"
    tensors = {name: parts for name, parts in LLAMA_TENSORS.items() if name != _GATE} | biases(
        "q", "k", "v", "o", "up", "down"
    )
    defaults = LLAMA_DEFAULTS | {"hidden_act": "relu2", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
    nemo_fixed = fixed("add_bias_linear", "seq_len_interpolation_factor", gated_linear_unit=False)

    def features(self, config: HfConfig) -> JsonObject:
        return super().features(config) | {"gated_mlp": False}

    def nemo_config(self, config: HfConfig) -> tuple[str, JsonObject]:
        name, fields = super().nemo_config(config)
        activation = nemo_activation(self.value(config, "hidden_act"), default="")  # LlamaConfig's own is silu
        return name, fields | activation | {"gated_linear_unit": False}

    def claims(self, fields: JsonFields) -> bool:
        return fields.get("gated_linear_unit") is False
