"""Qwen3-MoE: Qwen3-30B-A3B, Qwen3-235B-A22B and all that transformers loads as Qwen3MoeForCausalLM.

A layer is a mixture of experts or, where `mlp_only_layers` or `decoder_sparse_step` say so, dense.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts.json_types import HfConfig, JsonFields, JsonObject
from nemo_minitron.errors import InputError
from nemo_minitron.families.base import LLAMA_DEFAULTS, LLAMA_SIZES, Family
from nemo_minitron.families.qwen3 import Qwen3
from nemo_minitron.families.translate import check_choice, fixed, hf_window, nemo_window

MLP = "model.layers.{i}.mlp."
MIXTURE: dict[str, tuple[str, ...]] = {  # a mixture's tensors: those of its router and of each expert
    f"{MLP}gate.weight": ("layers.{i}.router.weight",),
    **{
        f"{MLP}experts.{{e}}.{name}_proj.weight": (f"layers.{{i}}.experts.{{e}}.{name}.weight",)
        for name in ("gate", "up", "down")
    },
}


class Qwen3Moe(Qwen3):
    model_type = "qwen3_moe"
    hf_class = "Qwen3MoeForCausalLM"
    nemo_model = "Qwen3Model"
    nemo_class = "Qwen3MoEConfig"
    tensors = Qwen3.tensors | MIXTURE
    sizes = LLAMA_SIZES | {
        "num_moe_experts": "num_experts",
        "moe_router_topk": "num_experts_per_tok",
        "moe_ffn_hidden_size": "moe_intermediate_size",
    }
    defaults = LLAMA_DEFAULTS | {
        "decoder_sparse_step": 1,
        "max_position_embeddings": 32768,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_key_value_heads": 4,
        "router_aux_loss_coef": 0.001,
        "sliding_window": 4096,
    }
    nemo_fields = Qwen3.nemo_fields | {"moe_aux_loss_coeff": "router_aux_loss_coef"}
    nemo_fixed = fixed(
        "num_moe_experts",
        "window_size",
        "seq_len_interpolation_factor",
        qk_layernorm=True,
        moe_router_score_function="softmax",
        moe_router_enable_expert_bias=False,
        moe_router_num_groups=None,
        moe_router_topk_scaling_factor=None,
        moe_shared_expert_intermediate_size=None,
    )
    reads = frozenset({"attention_bias", "mlp_only_layers", "use_sliding_window"})
    no_effect = frozenset({"max_window_layers"})  # published configs have it; transformers' class does not read it
    # transformers 5 runs the experts as one grouped matrix product, which needs rows of 16 bytes: 8 elements of 16 bits
    multiples: ClassVar[Mapping[str, int | str]] = {"hidden_size": 8, "moe_ffn_hidden_size": 8}
    exact_axes = frozenset({"expert_ffn", "ffn", "heads", "query_groups", "layers", "vocab"})

    def features(self, config: HfConfig) -> JsonObject:
        return super().features(config) | {"moe_layer_freq": self._pattern(config)}

    def _pattern(self, config: HfConfig) -> tuple[int, ...]:
        """One 0 (dense) or 1 (mixture) a layer, as transformers decides it."""
        layers, step = self.read_sizes(config)["num_layers"], self.value(config, "decoder_sparse_step")
        dense = config.get("mlp_only_layers") or []
        if not isinstance(step, int) or isinstance(step, bool) or step < 1:
            raise InputError(f"the config's decoder_sparse_step is {step!r}; it must be a whole number of at least 1")
        if not isinstance(dense, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in dense):
            raise InputError(f"the config's mlp_only_layers is {dense!r}; it must be a list of layer numbers")
        known = range(layers) if isinstance(layers, int) and 0 < layers <= 10_000 else ()
        pattern = tuple(int((layer + 1) % step == 0 and layer not in dense) for layer in known)
        if pattern and not any(pattern):
            raise InputError(
                f"no layer of this {self.hf_class} is a mixture of experts, by its decoder_sparse_step and "
                "mlp_only_layers; at least one must be"
            )
        return pattern

    def config(self, architecture: Architecture, base: HfConfig, layers: Sequence[int] | None = None) -> JsonObject:
        """As in Family; also says which layers are dense, and keeps their width where there are none."""
        if not architecture.num_moe_experts:
            raise InputError(
                f"the layers that stay are all dense, which no {self.hf_class} is; keep at least one layer that is a "
                "mixture of experts"
            )
        own = {}
        if architecture.num_layers != self.read_sizes(base)["num_layers"]:
            own = {"decoder_sparse_step": 1, "mlp_only_layers": list(architecture.dense_layers)}
        result = Family.config(self, architecture, {**base, **own}, layers)
        unused = not architecture.dense_layers and "intermediate_size" in base
        return result | ({"intermediate_size": base["intermediate_size"]} if unused else {})

    def nemo_config(self, config: HfConfig) -> tuple[str, JsonObject]:
        """As in Family. Megatron normalizes the chosen experts' probabilities where it takes the softmax after the
        choice."""
        name, fields = Family.nemo_config(self, config)
        normalized = self.value(config, "norm_topk_prob")
        if not isinstance(normalized, bool):
            raise InputError(f"the config's norm_topk_prob is {normalized!r}; it must be true or false")
        if normalized:
            check_choice(fields)
        own = {"moe_router_pre_softmax": not normalized, "ffn_hidden_size": self.value(config, "intermediate_size")}
        return name, fields | own

    def windows(self, config: HfConfig) -> JsonObject:
        return nemo_window(self.value(config, "sliding_window") if config.get("use_sliding_window") else None)

    def from_nemo(self, fields: JsonFields) -> JsonObject:
        freq = fields.get("moe_layer_freq", 1)
        window = hf_window(fields)
        return Family.from_nemo(self, fields) | {
            **window,
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": _dense_layers(freq, fields["num_layers"]),
            "norm_topk_prob": not fields["moe_router_pre_softmax"],
            "use_sliding_window": window["sliding_window"] is not None,
        }


def _dense_layers(freq: int | Sequence[int], layers: int) -> list[int]:
    """The dense layers of Megatron's `moe_layer_freq`."""
    marks = [int(layer % freq == 0) for layer in range(layers)] if isinstance(freq, int) else list(freq)
    return [layer for layer, mixture in enumerate(marks) if not mixture]
