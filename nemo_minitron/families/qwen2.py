"""Qwen2: Qwen2, Qwen2.5 and all that transformers loads as Qwen2ForCausalLM: biases in q, k and v."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts.json_types import HfConfig, JsonFields, JsonObject
from nemo_minitron.errors import InputError
from nemo_minitron.families.base import LLAMA_DEFAULTS, Family
from nemo_minitron.families.keys import FULL, SLIDING, layer_types
from nemo_minitron.families.stored import LLAMA_TENSORS, biases
from nemo_minitron.families.translate import fixed, hf_layer_types, hf_window, nemo_window


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
    nemo_fixed = fixed("window_size", "window_attn_skip_freq", "seq_len_interpolation_factor", add_qkv_bias=True)
    reads = frozenset({"layer_types", "use_sliding_window"})

    def features(self, config: HfConfig) -> JsonObject:
        return super().features(config) | {"qkv_bias": True}

    def config(self, architecture: Architecture, base: HfConfig, layers: Sequence[int] | None = None) -> JsonObject:
        """As in Family; also adapts `max_window_layers`, the number of first layers, which have no window."""
        result = super().config(architecture, base, layers)
        first, after = self._first_window(base), architecture.num_layers
        kinds = self._layer_types(base)
        if after == len(kinds):
            return result
        if layers is None and len(set(kinds)) > 1:
            raise InputError(
                f"some layers of this {self.hf_class} look back over a window and some over everything, so its "
                f"layers cannot be cut to {after} before it is known which ones stay; the nearest legal number is "
                f"{len(kinds)}"
            )
        stay = range(after) if layers is None else layers
        return result | {"max_window_layers": sum(layer < first for layer in stay)}

    def windows(self, config: HfConfig) -> JsonObject:
        window = self.value(config, "sliding_window") if config.get("use_sliding_window") else None
        return nemo_window(window, self._layer_types(config))

    def from_nemo(self, fields: JsonFields) -> JsonObject:
        result = super().from_nemo(fields)
        if not fields.get("window_size"):
            return result | {"use_sliding_window": False}
        kinds = hf_layer_types(fields)
        own = {"layer_types": kinds, "max_window_layers": kinds.index(SLIDING) if SLIDING in kinds else len(kinds)}
        return result | hf_window(fields) | {"use_sliding_window": True} | own

    def _layer_types(self, config: HfConfig) -> list[str]:
        """transformers' name for the attention of each layer."""
        if listed := layer_types(config):
            return listed
        window = config.get("use_sliding_window") and self.value(config, "sliding_window")
        first = self._first_window(config)
        layers = range(self.read_sizes(config)["num_layers"])
        return [SLIDING if window and layer >= first else FULL for layer in layers]

    def _first_window(self, config: HfConfig) -> int:
        first = self.value(config, "max_window_layers")
        if not isinstance(first, int):
            raise InputError(f"the config's max_window_layers is {first!r}; it must be a number of layers")
        return first
