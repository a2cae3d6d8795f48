"""Mixtral: Mixtral 8x7B, 8x22B and all that transformers loads as MixtralForCausalLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_minitron.families.base import LLAMA_SIZES, LLAMA_TENSORS, Config, Family, nemo_sizes
from nemo_minitron.families.llama import common_config, common_fields

_BLOCK = "model.layers.{i}.block_sparse_moe."
_DEFAULTS = {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_position_embeddings": 131072}  # transformers' own


class Mixtral(Family):
    model_type = "mixtral"
    hf_class = "MixtralForCausalLM"
    nemo_model = "MixtralModel"
    tensors = LLAMA_TENSORS | {
        f"{_BLOCK}gate.weight": ("layers.{i}.router.weight",),
        f"{_BLOCK}experts.{{e}}.w1.weight": ("layers.{i}.experts.{e}.gate.weight",),
        f"{_BLOCK}experts.{{e}}.w3.weight": ("layers.{i}.experts.{e}.up.weight",),
        f"{_BLOCK}experts.{{e}}.w2.weight": ("layers.{i}.experts.{e}.down.weight",),
    }
    sizes = LLAMA_SIZES | {
        "num_moe_experts": "num_local_experts",
        "moe_router_topk": "num_experts_per_tok",
        "moe_ffn_hidden_size": "intermediate_size",
    }
    exact_axes = frozenset({"expert_ffn", "heads", "query_groups", "layers", "vocab"})

    def default_sizes(self, config: Config) -> dict[str, int]:
        defaults = {"num_query_groups": 8, "num_moe_experts": 8, "moe_router_topk": 2}
        return super().default_sizes(config) | defaults

    def nemo_config(self, config: Config) -> tuple[str, dict[str, Any]]:
        fields = nemo_sizes(self.architecture(config)) | common_fields({**_DEFAULTS, **config})
        window = config.get("sliding_window")
        return "MixtralConfig8x7B", fields | {
            "moe_aux_loss_coeff": config.get("router_aux_loss_coef", 0.001),
            "max_position_embeddings": fields["seq_length"],
            "window_size": [window - 1, 0] if window else None,  # as Mistral's
        }

    def from_nemo(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        window = fields.get("window_size")
        return common_config(self, fields) | {
            "intermediate_size": fields["moe_ffn_hidden_size"] or fields["ffn_hidden_size"],
            "num_local_experts": fields["num_moe_experts"],
            "num_experts_per_tok": fields["moe_router_topk"],
            "router_aux_loss_coef": fields["moe_aux_loss_coeff"],
            "sliding_window": window[0] + 1 if window else None,
        }
