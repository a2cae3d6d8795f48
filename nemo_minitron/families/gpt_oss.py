"""gpt-oss: gpt-oss-20b, gpt-oss-120b and all that transformers loads as GptOssForCausalLM.

Every layer is a mixture, whose experts and router have biases; each head has a learned logit beside its scores; every
second layer has a window. The folder holds all experts of a layer in one tensor, published in MXFP4 (two tensors:
`sources/stacks.py`); a student is written in bf16, with a config that names no quantization.

transformers 4 and 5 give a silent config YaRN and windows in the even layers; a student's config says both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts.json_types import HfConfig, JsonFields, JsonObject
from nemo_minitron.errors import InputError
from nemo_minitron.families.base import LLAMA_DEFAULTS, LLAMA_SIZES, NEMO_FIELDS, Family
from nemo_minitron.families.keys import FULL, SLIDING, layer_types
from nemo_minitron.families.stored import LLAMA_TENSORS, biases
from nemo_minitron.families.translate import check_choice, fixed, hf_layer_types, hf_window, nemo_window, rope_of

LIMIT = 7.0  # transformers' class always has it
ACTIVATION = "megatron.core.fusions.fused_bias_geglu.quick_gelu"  # x sigmoid(1.702 x)
YARN: JsonObject = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
_MLP, _EXPERT = "model.layers.{i}.mlp.", "layers.{i}.experts.{e}."


class GptOss(Family):
    model_type = "gpt_oss"
    hf_class = "GptOssForCausalLM"
    hosts: ClassVar[tuple[str, ...]] = ("bridge",)
    nemo_model = "GPTOSSModel"
    nemo_class = "GPTOSSConfig"
    tensors = (
        LLAMA_TENSORS
        | biases("q", "k", "v", "o")
        | {
            "model.layers.{i}.self_attn.sinks": ("layers.{i}.sinks",),
            f"{_MLP}router.weight": ("layers.{i}.router.weight",),
            f"{_MLP}router.bias": ("layers.{i}.router.bias",),
        }
    )
    stacks: ClassVar[Mapping[str, tuple[str, ...]]] = {
        f"{_MLP}experts.gate_up_proj": (f"{_EXPERT}gate.weight", f"{_EXPERT}up.weight"),
        f"{_MLP}experts.gate_up_proj_bias": (f"{_EXPERT}gate.bias", f"{_EXPERT}up.bias"),
        f"{_MLP}experts.down_proj": (f"{_EXPERT}down.weight",),
        f"{_MLP}experts.down_proj_bias": (f"{_EXPERT}down.bias",),
    }
    sizes = LLAMA_SIZES | {
        "num_moe_experts": "num_local_experts",
        "moe_router_topk": "num_experts_per_tok",
        "moe_ffn_hidden_size": "intermediate_size",
    }
    defaults = LLAMA_DEFAULTS | {
        "attention_bias": True,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "num_experts_per_tok": 4,
        "num_key_value_heads": 8,
        "num_local_experts": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "router_aux_loss_coef": 0.9,  # transformers 5 says 0.001 where the config is silent; published configs say 0.9
        "sliding_window": 128,
    }
    nemo_fields = NEMO_FIELDS | {"moe_aux_loss_coeff": "router_aux_loss_coef"}
    nemo_fixed = fixed(
        "num_moe_experts",
        "seq_len_interpolation_factor",
        "window_attn_skip_freq",
        "window_size",
        activation_func_clamp_value=LIMIT,
        add_bias_linear=True,
        glu_linear_offset=1.0,
        moe_layer_freq=1,
        moe_router_enable_expert_bias=False,
        moe_router_num_groups=None,
        moe_router_pre_softmax=False,
        moe_router_score_function="softmax",
        moe_router_topk_scaling_factor=None,
        moe_shared_expert_intermediate_size=None,
        softmax_type="learnable",
    )
    reads = frozenset({
        "experts_per_token", "initial_context_length", "layer_types", "quantization_config", "swiglu_limit",
    })  # fmt: skip
    # transformers 5 runs the experts as one grouped matrix product, which needs rows of 16 bytes: 8 elements of 16 bits
    multiples: ClassVar[Mapping[str, int | str]] = {"hidden_size": 8, "moe_ffn_hidden_size": 8}
    own_activation = ACTIVATION
    exact_axes = frozenset({"expert_ffn", "heads", "query_groups", "layers", "vocab"})

    def features(self, config: HfConfig) -> JsonObject:
        self._check(config)
        biased = bool(self.value(config, "attention_bias"))
        return super().features(config) | {
            "qkv_bias": biased,
            "attention_output_bias": biased,
            "mlp_bias": True,
            "moe_router_bias": True,
            "attention_sinks": True,
        }

    def _check(self, config: HfConfig) -> None:
        """Raises InputError for a key that transformers' class does not read and that says something else."""
        original = self.rope(config)[1].get("original_max_position_embeddings")
        said: JsonObject = {"swiglu_limit": LIMIT, "experts_per_token": self.value(config, "num_experts_per_tok")}
        said |= {} if original is None else {"initial_context_length": original}
        for name, legal in said.items():
            value = config.get(name)
            if value is not None and value != legal:
                raise InputError(f"the config's {name} is {value!r}; a {self.hf_class} of its other keys has {legal!r}")
        scheme = config.get("quantization_config")
        method = scheme.get("quant_method") if isinstance(scheme, Mapping) else scheme
        if method not in (None, "mxfp4"):
            raise InputError(f"the config's quantization_config has quant_method {method!r}; legal is 'mxfp4', or none")

    def routers_loss(self, config: HfConfig) -> float:
        """None unless the config asks for it, as in transformers; Megatron-Bridge trains it without one, too. The
        published coefficient of 0.9, which transformers leaves unused, would outweigh the text."""
        return super().routers_loss(config) if config.get("output_router_logits") else 0.0

    def packed(self, config: HfConfig) -> bool:
        return bool(config.get("quantization_config"))

    def rope(self, config: HfConfig) -> tuple[str, JsonFields]:
        return rope_of(config if "rope_scaling" in config else {"rope_scaling": YARN})

    def _kinds(self, config: HfConfig) -> list[str]:
        layers = self.read_sizes(config)["num_layers"]
        return layer_types(config) or [FULL if layer % 2 else SLIDING for layer in range(layers)]

    def windows(self, config: HfConfig) -> JsonObject:
        """As in Family; Bridge's own provider has a window in every second layer until it is told otherwise."""
        return {"window_attn_skip_freq": None} | nemo_window(self.value(config, "sliding_window"), self._kinds(config))

    def config(self, architecture: Architecture, base: HfConfig, layers: Sequence[int] | None = None) -> JsonObject:
        """As in Family, for weights in bf16; it says what a silent config leaves to transformers."""
        own = {name: value for name, value in base.items() if name != "quantization_config"}
        silent = {"rope_scaling": YARN, "router_aux_loss_coef": self.defaults["router_aux_loss_coef"]}
        own = silent | own | {"layer_types": self._kinds(base)}
        if own.get("experts_per_token") is not None:  # the published configs' second name of num_experts_per_tok
            own["experts_per_token"] = architecture.moe_router_topk
        return super().config(architecture, own, layers)

    def nemo_config(self, config: HfConfig) -> tuple[str, JsonObject]:
        self.architecture(config)
        raise InputError(
            f"a {self.hf_class} is not built with NeMo's classes here, but with Megatron-Bridge's: give --host bridge"
        )

    def bridge_config(self, config: HfConfig) -> JsonObject:
        _, fields = super().nemo_config({**config, "hidden_act": self.defaults["hidden_act"]})
        check_choice(fields)
        # Bridge's own provider has YaRN until it is told otherwise
        return fields | {"moe_router_load_balancing_type": "aux_loss", "yarn_rotary_scaling_factor": None}

    def claims(self, fields: JsonFields) -> bool:
        return fields.get("softmax_type") == "learnable"

    def from_nemo(self, fields: JsonFields) -> JsonObject:
        """As in Family, of a checkpoint of Bridge."""
        given = fields.get("activation_func")
        if str(given).rsplit(".", 1)[-1] != "quick_gelu":
            raise InputError(f"the model's activation_func is {given!r}; a {self.hf_class} needs {ACTIVATION}")
        return {"rope_scaling": None} | super().from_nemo({**fields, "activation_func": None}) | hf_window(fields) | {
            "attention_bias": True, "layer_types": hf_layer_types(fields), "swiglu_limit": LIMIT,
        }  # fmt: skip
