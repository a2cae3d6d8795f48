"""SmolLM3: all that transformers loads as SmolLM3ForCausalLM: Llama without rotary positions in some layers.

transformers' `no_rope_layers` has a 1 for a layer with rotary positions, Megatron's `no_rope_freq` for one without.
NeMo has no class of its own for it: the model is NeMo's LlamaModel with `no_rope_freq`.
"""

from __future__ import annotations

from collections.abc import Sequence

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts.json_types import HfConfig, JsonFields, JsonObject
from nemo_minitron.errors import InputError
from nemo_minitron.families.base import LLAMA_DEFAULTS, Family
from nemo_minitron.families.keys import FULL, SLIDING, layer_types
from nemo_minitron.families.stored import LLAMA_TENSORS, biases
from nemo_minitron.families.translate import fixed, hf_layer_types, hf_window, nemo_window


class SmolLM3(Family):
    model_type = "smollm3"
    hf_class = "SmolLM3ForCausalLM"
    nemo_model = "LlamaModel"
    nemo_class = "LlamaConfig"
    tensors = LLAMA_TENSORS | biases("q", "k", "v", "o", "gate", "up", "down")
    defaults = LLAMA_DEFAULTS | {
        "max_position_embeddings": 32768,
        "no_rope_layer_interval": 4,
        "num_key_value_heads": 4,
        "rope_theta": 2e6,
        "sliding_window": None,
    }
    nemo_fixed = fixed("add_bias_linear", "window_size", "window_attn_skip_freq", "seq_len_interpolation_factor")
    reads = frozenset({"attention_bias", "layer_types", "mlp_bias", "no_rope_layers", "use_sliding_window"})

    def features(self, config: HfConfig) -> JsonObject:
        self.rope_layers(config)
        attention, mlp = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
        with_bias = {"qkv_bias": attention, "attention_output_bias": attention, "mlp_bias": mlp}
        return super().features(config) | with_bias | {"tied_embeddings": self._tied(config)}

    def rope_layers(self, config: HfConfig) -> list[int]:
        """One 1 (rotary positions) or 0 (none) a layer. Raises InputError for another form."""
        layers, listed = self.read_sizes(config)["num_layers"], config.get("no_rope_layers")
        if not isinstance(layers, int) or not 0 < layers <= 10_000:
            return []  # Architecture says what is wrong
        if listed is not None:
            if not isinstance(listed, list) or len(listed) != layers or not set(listed) <= {0, 1}:
                raise InputError(f"the config's no_rope_layers is {listed!r}; it needs a 0 or 1 for each of its layers")
            return [int(rope) for rope in listed]
        step = self.value(config, "no_rope_layer_interval")
        if not isinstance(step, int) or isinstance(step, bool) or step < 1:
            raise InputError(f"the config's no_rope_layer_interval is {step!r}; it must be at least 1")
        return [int((layer + 1) % step != 0) for layer in range(layers)]

    def config(self, architecture: Architecture, base: HfConfig, layers: Sequence[int] | None = None) -> JsonObject:
        """As in Family; the layers' rotary positions are written out where layers go, as the interval would shift."""
        if architecture.num_layers != self.read_sizes(base)["num_layers"]:
            base = {**base, "no_rope_layers": self.rope_layers(base)}
        return super().config(architecture, base, layers)

    def written(self, config: HfConfig) -> JsonObject:
        """As in Family; the tie is written out, because its default is not other families'."""
        return super().written(config) | {"tie_word_embeddings": self._tied(config)}

    def _tied(self, config: HfConfig) -> bool:
        return bool(config.get("tie_word_embeddings", True))  # transformers' default

    def nemo_config(self, config: HfConfig) -> tuple[str, JsonObject]:
        name, fields = super().nemo_config(config)
        return name, fields | {"no_rope_freq": [1 - rope for rope in self.rope_layers(config)]}

    def windows(self, config: HfConfig) -> JsonObject:
        window = self.value(config, "sliding_window") if config.get("use_sliding_window") else None
        # where the config does not say, transformers gives the window to the layers without rotary positions
        kinds = layer_types(config) or [FULL if rope or not window else SLIDING for rope in self.rope_layers(config)]
        return nemo_window(window, kinds)

    def claims(self, fields: JsonFields) -> bool:
        return fields.get("no_rope_freq") is not None

    def from_nemo(self, fields: JsonFields) -> JsonObject:
        windows = hf_window(fields) | {"use_sliding_window": bool(fields.get("window_size"))}
        config = super().from_nemo(fields) | windows | {"layer_types": hf_layer_types(fields)}
        skipped, layers = fields["no_rope_freq"], fields["num_layers"]
        if isinstance(skipped, int):  # Megatron's N: every N-th layer has none
            skipped = [int((layer + 1) % skipped == 0) for layer in range(layers)]
        config["no_rope_layers"] = [1 - skip for skip in skipped]
        return config | dict.fromkeys(("attention_bias", "mlp_bias"), bool(fields["add_bias_linear"]))
