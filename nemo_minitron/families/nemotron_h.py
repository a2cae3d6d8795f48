"""Nemotron-H and Nano v2: all that transformers loads as NemotronHForCausalLM without experts and without layers of
multi-token prediction. Each layer is Mamba-2, attention without positions, or an MLP of two matrices.

transformers 5 writes the kinds of layers as `layers_block_type`, NVIDIA's own code as `hybrid_override_pattern`; and it
writes `backbone.embedding.weight` where NVIDIA's checkpoints have `backbone.embeddings.weight`. Both are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from nemo_minitron import hybrid
from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts.json_types import HfConfig, Json, JsonFields, JsonObject
from nemo_minitron.errors import InputError
from nemo_minitron.families.base import LLAMA_SIZES, Family, nemo_sizes
from nemo_minitron.families.translate import MTP, check_fixed, hf_activation, hf_sizes

_LAYER = "backbone.layers.{i}."
_ONE_TO_ONE = {
    "norm": "input_norm", "mixer.norm": "gated_norm", "mixer.out_proj": "out", "mixer.q_proj": "q",
    "mixer.k_proj": "k", "mixer.v_proj": "v", "mixer.o_proj": "o", "mixer.up_proj": "up", "mixer.down_proj": "down",
}  # fmt: skip
_ONLY: Mapping[str, Json] = {  # key -> what Megatron's mixer, or this package, has in its place; null counts as it
    "attention_bias": False, "conv_kernel": hybrid.KERNEL, "layer_norm_epsilon": 1e-5, "mamba_hidden_act": "silu",
    "mamba_proj_bias": False, "mlp_bias": False, "mlp_hidden_act": "relu2", "num_nextn_predict_layers": 0,
    "residual_in_fp32": False, "sliding_window": None, "use_bias": False, "use_conv_bias": True,
}  # fmt: skip
_BRIDGE_FIXED: JsonFields = {  # field of Bridge's provider -> the only value that transformers' class has
    "add_bias_linear": False, "add_qkv_bias": False, "gated_linear_unit": False, "layernorm_zero_centered_gamma": False,
    "mtp_hybrid_override_pattern": None, "normalization": "RMSNorm", "num_moe_experts": None,
    "position_embedding_type": "none", "qk_layernorm": False, "softmax_scale": None, "use_mup": False,
    "window_attn_skip_freq": None, "window_size": None,
}  # fmt: skip
_PATTERN, _BLOCKS, _LIMIT = "hybrid_override_pattern", "layers_block_type", "time_step_limit"
_INFINITE = ({"__float__": "Infinity"}, float("inf"))  # transformers 5's form, and NVIDIA's


class NemotronH(Family):
    model_type = "nemotron_h"
    hf_class = "NemotronHForCausalLM"
    hosts: ClassVar[tuple[str, ...]] = ("bridge",)
    nemo_model = "MambaModel"
    nemo_class = "NemotronHConfigBase"
    activation = "mlp_hidden_act"
    tensors: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "backbone.embeddings.weight": ("embedding.weight",),
        **{f"{_LAYER}{theirs}.weight": (f"layers.{{i}}.{ours}.weight",) for theirs, ours in _ONE_TO_ONE.items()},
        f"{_LAYER}mixer.in_proj.weight": tuple(f"layers.{{i}}.{part}.weight" for part in ("z", "x", "b", "c", "dt")),
        **{
            f"{_LAYER}mixer.conv1d.{kind}": tuple(f"layers.{{i}}.{part}_conv.{kind}" for part in ("x", "b", "c"))
            for kind in ("weight", "bias")
        },
        f"{_LAYER}mixer.A_log": ("layers.{i}.a_log",),
        f"{_LAYER}mixer.D": ("layers.{i}.d",),
        f"{_LAYER}mixer.dt_bias": ("layers.{i}.dt.bias",),
        "backbone.norm_f.weight": ("final_norm.weight",),
        "lm_head.weight": ("head.weight",),
    }
    aliases: ClassVar[Mapping[str, str]] = {"backbone.embedding.weight": "backbone.embeddings.weight"}
    sizes: ClassVar[Mapping[str, str]] = LLAMA_SIZES | {
        "mamba_num_heads": "mamba_num_heads",
        "mamba_head_dim": "mamba_head_dim",
        "mamba_num_groups": "n_groups",
        "mamba_state_dim": "ssm_state_size",
    }
    defaults: ClassVar[JsonFields] = dict(_ONLY) | {
        "chunk_size": 128,
        "initializer_range": 0.02,
        "max_position_embeddings": 4096,
    }
    nemo_fields: ClassVar[Mapping[str, str]] = {
        "init_method_std": "initializer_range",
        "layernorm_epsilon": "layer_norm_epsilon",
        "seq_length": "max_position_embeddings",
    }
    nemo_fixed: ClassVar[JsonFields] = {}
    rope_types: ClassVar[tuple[str, ...]] = ()
    reads = frozenset({_PATTERN, _BLOCKS, _LIMIT, "attention_head_dim"})
    no_effect = frozenset({
        "expand", "hidden_dropout", "mamba_ssm_cache_dtype", "num_logits_to_keep",
        "rescale_prenorm_residual", "time_step_floor", "time_step_max", "time_step_min", "use_mamba_kernels",
        # of experts and of multi-token prediction, which these models have not
        "moe_intermediate_size", "moe_latent_size", "moe_shared_expert_intermediate_size", "moe_shared_expert_overlap",
        "mtp_hybrid_override_pattern", "mtp_layers_block_type", "n_group", "n_routed_experts", "n_shared_experts",
        "norm_topk_prob", "num_experts_per_tok", "routed_scaling_factor", "topk_group",
    })  # fmt: skip

    def pattern(self, config: HfConfig) -> str:
        """Megatron's symbol for each layer. Raises InputError if the config has none, two that differ, or experts."""
        symbols = {kind: symbol for symbol, kind in hybrid.KINDS.items()}
        found, blocks = config.get(_PATTERN), config.get(_BLOCKS)
        if blocks is not None:
            if not isinstance(blocks, list) or not all(block in symbols for block in blocks):
                raise InputError(f"the config's {_BLOCKS} is {blocks!r}; legal are {', '.join(symbols)} in a list")
            written = "".join(symbols[block] for block in blocks)
            if found not in (None, written):
                raise InputError(f"the config's {_PATTERN} is '{found}', and its {_BLOCKS} say '{written}'")
            found = written
        if not isinstance(found, str) or not found or not set(found) <= hybrid.KINDS.keys():
            raise InputError(f"the config's {_PATTERN} is {found!r}; legal are the symbols {' '.join(hybrid.KINDS)}")
        return found

    def read_sizes(self, config: HfConfig) -> dict[str, int]:
        """The number of layers is the pattern's, whatever `num_hidden_layers` says: so transformers 5 has it."""
        named = {"head_dim": config.get("head_dim") or config.get("attention_head_dim")}
        return super().read_sizes({**config, **named, "num_hidden_layers": len(self.pattern(config))})

    def features(self, config: HfConfig) -> JsonObject:
        for name, legal in _ONLY.items():
            if self.value(config, name) not in (None, legal):
                needs = MTP if name == "num_nextn_predict_layers" else f"a {self.hf_class} here needs {legal!r}"
                raise InputError(f"the config's {name} is {config[name]!r}; {needs}")
        least, most = self.value(config, _LIMIT) or (0.0, _INFINITE[0])
        if least or most not in _INFINITE:
            raise InputError(f"the config's {_LIMIT} is {config[_LIMIT]!r}; Megatron's mixer has 0 to infinity")
        alone = {"gated_mlp": False, "hybrid_pattern": self.pattern(config)}
        return super().features(config) | alone

    def config(self, architecture: Architecture, base: HfConfig, layers: Sequence[int] | None = None) -> JsonObject:
        """As in Family; both names of the pattern are written. Raises InputError if layers go before it is known which
        ones."""
        pattern = architecture.hybrid_pattern or ""
        kinds = {_PATTERN: pattern, _BLOCKS: [hybrid.KINDS[symbol] for symbol in pattern]}
        return super().config(architecture, {**base, **kinds, "num_hidden_layers": len(pattern)}, layers)

    def written(self, config: HfConfig) -> JsonObject:
        """As it is: there are no rotary positions to be written in two forms."""
        return {**config, "dtype": config["torch_dtype"]} if config.get("torch_dtype") else dict(config)

    def nemo_config(self, config: HfConfig) -> tuple[str, JsonObject]:
        self.architecture(config)
        raise InputError(
            f"a {self.hf_class} is built by Megatron-Bridge, not by NeMo 2, in this package: give --host bridge"
        )

    def bridge_config(self, config: HfConfig) -> JsonObject:
        a = self.architecture(config)
        fields = {name: self.value(config, key) for name, key in self.nemo_fields.items()}
        without = {
            "moe_shared_expert_intermediate_size": None,
            "moe_shared_expert_overlap": False,
            "num_moe_experts": None,
        }
        return fields | nemo_sizes(a) | without | {
            **{name: getattr(a, name) for name in hybrid.SIZES},
            "mamba_chunk_size": self.value(config, "chunk_size"),
            "add_bias_linear": False, "first_last_layers_bf16": False, "gated_linear_unit": False,
            "hybrid_layer_pattern": a.hybrid_pattern, "is_hybrid_model": True, "mtp_num_layers": 0,
            "mtp_hybrid_override_pattern": None, "normalization": "RMSNorm", "position_embedding_type": "none",
        }  # fmt: skip

    def claims(self, fields: JsonFields) -> bool:
        return bool(fields.get("hybrid_layer_pattern"))

    def from_nemo(self, fields: JsonFields) -> JsonObject:
        """Of Megatron-Bridge's fields."""
        pattern = fields["hybrid_layer_pattern"]
        check_fixed(fields, _BRIDGE_FIXED, self.hf_class)
        symbols = str(pattern).replace("|", "")  # which may say where the pipeline's stages end
        config = {
            "architectures": [self.hf_class],
            "model_type": self.model_type,
            "mlp_hidden_act": hf_activation(fields.get("activation_func"), "relu2"),
            "tie_word_embeddings": bool(fields["share_embeddings_and_output_weights"]),
            "chunk_size": fields["mamba_chunk_size"],
            _PATTERN: symbols,
            **hf_sizes(fields, self.sizes),
            **{key: fields[name] for name, key in self.nemo_fields.items()},
        }
        return config | {_BLOCKS: [hybrid.KINDS[symbol] for symbol in self.pattern(config)]}
