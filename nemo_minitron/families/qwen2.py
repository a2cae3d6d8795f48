"""Qwen2: Qwen2, Qwen2.5 and all that transformers loads as Qwen2ForCausalLM: biases in q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_minitron.architecture import Architecture
from nemo_minitron.errors import InputError
from nemo_minitron.families.base import LLAMA_DEFAULTS, LLAMA_TENSORS, Config, Family, biases
from nemo_minitron.families.translate import fixed

_FULL = "full_attention"


class Qwen2(Family):
    model_type = "qwen2"
    hf_class = "Qwen2ForCausalLM"
    nemo_model = "Qwen2Model"
    nemo_class = "Qwen2Config"
    tensors = LLAMA_TENSORS | biases("q", "k", "v")
    defaults = LLAMA_DEFAULTS | {
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
    }
    nemo_fixed = fixed("seq_len_interpolation_factor", add_qkv_bias=True)

    def features(self, config: Config) -> dict[str, Any]:
        return super().features(config) | {"qkv_bias": True}

    def config(self, architecture: Architecture, base: Config) -> dict[str, Any]:
        """Also refuses a cut of layers where they do not all attend alike: a size does not say which ones stay."""
        result = super().config(architecture, base)
        kinds, layers = self._layer_types(base), architecture.num_layers
        if layers != len(kinds):
            if len(set(kinds)) > 1:
                raise InputError(
                    f"some layers of this {self.hf_class} look back over a window and some over everything, so that "
                    f"its layers cannot be cut to {layers}; the nearest legal number is {len(kinds)}"
                )
            if base.get("layer_types"):
                result["layer_types"] = kinds[:1] * layers
        return result

    def nemo_config(self, config: Config) -> tuple[str, dict[str, Any]]:
        if set(self._layer_types(config)) - {_FULL}:
            raise InputError(f"NeMo's {self.nemo_model} has no sliding window; set use_sliding_window to false")
        return super().nemo_config(config)

    def from_nemo(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        return super().from_nemo(fields) | {"use_sliding_window": False}

    def _layer_types(self, config: Config) -> list[str]:
        """transformers' words for how each layer attends."""
        if config.get("layer_types"):
            return list(config["layer_types"])
        window = config.get("use_sliding_window") and self.value(config, "sliding_window")
        first = self.value(config, "max_window_layers")
        layers = range(self.read_sizes(config)["num_layers"])
        return ["sliding_attention" if window and layer >= first else _FULL for layer in layers]
