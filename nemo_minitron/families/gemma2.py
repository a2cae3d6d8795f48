"""Gemma 2: all that transformers loads as Gemma2ForCausalLM.

Each layer has four norms, whose weights are stored less 1. Embeddings are multiplied by sqrt(hidden_size). Attention
has a scale of its own, and a window in every other layer. The scores of attention and the logits are capped:
cap * tanh(x / cap).

NeMo 2.7 builds another function beyond the window, so the model is built by Megatron-Bridge alone, from a provider of
this package (`hosts/bridge/gemma.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts.json_types import HfConfig, JsonFields, JsonObject
from nemo_minitron.errors import InputError
from nemo_minitron.families.base import Family
from nemo_minitron.families.keys import FULL, SLIDING, layer_types
from nemo_minitron.families.stored import LLAMA_TENSORS
from nemo_minitron.families.translate import fixed, hf_layer_types, hf_window, nemo_window, rope_of

_LAYER = "model.layers.{i}."
CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
LOCAL = "rotary_base_local"  # the provider's field; None: all layers have one rotary base


class Gemma2(Family):
    model_type = "gemma2"
    hf_class = "Gemma2ForCausalLM"
    hosts: ClassVar[tuple[str, ...]] = ("bridge",)
    nemo_model = "Gemma2Model"
    nemo_class = "Gemma2Config"
    activation = "hidden_activation"
    tensors = LLAMA_TENSORS | {
        f"{_LAYER}post_attention_layernorm.weight": ("layers.{i}.post_attention_norm.weight",),
        f"{_LAYER}pre_feedforward_layernorm.weight": ("layers.{i}.pre_mlp_norm.weight",),
        f"{_LAYER}post_feedforward_layernorm.weight": ("layers.{i}.post_mlp_norm.weight",),
    }
    defaults: ClassVar[JsonObject] = {
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh", "initializer_range": 0.02, "max_position_embeddings": 8192,
        "num_attention_heads": 8, "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 256_000,
    }  # fmt: skip
    nemo_fixed = fixed(
        "seq_len_interpolation_factor", "softmax_scale", "window_size", "window_attn_skip_freq",
        layernorm_zero_centered_gamma=True,
    )  # fmt: skip
    only: ClassVar[JsonObject] = {"attention_bias": False, "use_bidirectional_attention": False}
    """Key -> the only value that is supported; null counts as it."""
    reads: ClassVar[frozenset[str]] = frozenset({"attention_bias", "layer_types", "use_bidirectional_attention"})
    no_effect: ClassVar[frozenset[str]] = frozenset({"cache_implementation", "hidden_act"})
    multiples: ClassVar[Mapping[str, int | str]] = {"hidden_size": "num_attention_heads"}  # transformers 5 checks this

    def features(self, config: HfConfig) -> JsonObject:
        for name, legal in self.only.items():
            if config.get(name) not in (None, legal):
                raise InputError(f"the config's {name} is {config[name]!r}; a {self.hf_class} here needs {legal!r}")
        kind, _ = rope_of(config)
        if kind not in self.rope_types:
            raise InputError(
                f"rope_scaling '{kind}' is not supported for a {self.hf_class}; legal are {', '.join(self.rope_types)}"
            )
        own = dict.fromkeys(("post_norms", "scaled_embeddings", "zero_centered_norms"), True)
        own["capped_attention"] = self.value(config, CAPS[0]) is not None
        return {"tied_embeddings": self._tied(config)} | own

    def period(self, config: HfConfig) -> int:
        """Every how many layers one has no window, where the config does not list the layers."""
        return 2

    def kinds(self, config: HfConfig) -> list[str]:
        """transformers' name for the attention of each layer."""
        layers, period = self.read_sizes(config)["num_layers"], self.period(config)
        return layer_types(config) or [SLIDING if (layer + 1) % period else FULL for layer in range(layers)]

    def windows(self, config: HfConfig) -> JsonObject:
        return nemo_window(self.value(config, "sliding_window"), self.kinds(config))

    def config(self, architecture: Architecture, base: HfConfig, layers: Sequence[int] | None = None) -> JsonObject:
        """As in Family; the layers' windows are written out where layers go, as the pattern would shift."""
        if architecture.num_layers != self.read_sizes(base)["num_layers"]:
            base = {**base, "layer_types": self.kinds(base)}
        return super().config(architecture, base, layers)

    def written(self, config: HfConfig) -> JsonObject:
        """As in Family; the tie is written out, because its default is not other families'."""
        return super().written(config) | {"tie_word_embeddings": self._tied(config)}

    def _tied(self, config: HfConfig) -> bool:
        return bool(config.get("tie_word_embeddings", True))  # transformers' default

    def nemo_config(self, config: HfConfig) -> tuple[str, JsonObject]:
        self.architecture(config)
        raise InputError(
            f"NeMo 2 builds no {self.hf_class} that computes what transformers computes; Megatron-Bridge does: give "
            "--host bridge"
        )

    def bridge_config(self, config: HfConfig) -> JsonObject:
        _, fields = super().nemo_config(config)
        return fields | {name: self.value(config, name) for name in CAPS} | {
            "bias_activation_fusion": False,  # Megatron fuses no GELU by tanh
            "softmax_scale": self.value(config, "query_pre_attn_scalar") ** -0.5,
            LOCAL: None,
        }  # fmt: skip

    def claims(self, fields: JsonFields) -> bool:
        return LOCAL in fields and fields[LOCAL] is None

    def from_nemo(self, fields: JsonFields) -> JsonObject:
        """As in Family, of a checkpoint that has the fields of this package's provider on Megatron-Bridge."""
        scalar = fields["softmax_scale"] ** -2
        whole = round(scalar)  # transformers 5 takes whole numbers alone
        own = {name: fields[name] for name in CAPS} | {"layer_types": hf_layer_types(fields)}
        own["query_pre_attn_scalar"] = whole if math.isclose(scalar, whole, rel_tol=1e-9) else scalar
        window = hf_window(fields) if fields.get("window_size") else {}  # null would be another config of transformers
        return super().from_nemo(fields) | own | window
