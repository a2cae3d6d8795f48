"""Mixtral: Mixtral 8x7B, 8x22B and all that transformers loads as MixtralForCausalLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from nemo_minitron.artifacts.json_types import HfConfig, JsonObject
from nemo_minitron.families.base import LLAMA_SIZES, NEMO_FIELDS
from nemo_minitron.families.mistral import Mistral
from nemo_minitron.families.stored import LLAMA_TENSORS
from nemo_minitron.families.translate import check_choice, fixed

_BLOCK = "model.layers.{i}.block_sparse_moe."


class Mixtral(Mistral):
    model_type = "mixtral"
    hf_class = "MixtralForCausalLM"
    nemo_model = "MixtralModel"
    nemo_class = "MixtralConfig8x7B"
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
    defaults = Mistral.defaults | {
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
    }
    nemo_fields = NEMO_FIELDS | {
        "max_position_embeddings": "max_position_embeddings",
        "moe_aux_loss_coeff": "router_aux_loss_coef",
    }
    nemo_fixed = fixed(
        "num_moe_experts", "window_size", "seq_len_interpolation_factor", moe_shared_expert_intermediate_size=None
    )
    reads = frozenset()
    # transformers runs the experts as one grouped matrix product, which needs rows of 16 bytes: 8 elements of 16 bits
    multiples: ClassVar[Mapping[str, int | str]] = {"hidden_size": 8, "moe_ffn_hidden_size": 8}
    no_effect = frozenset({"router_jitter_noise"})  # used only in transformers' training
    exact_axes = frozenset({"expert_ffn", "heads", "query_groups", "layers", "vocab"})

    def nemo_config(self, config: HfConfig) -> tuple[str, JsonObject]:
        name, fields = super().nemo_config(config)
        check_choice(fields)
        return name, fields
