"""Ministral: Ministral-8B and all that transformers loads as MinistralForCausalLM: Mistral with windows in some layers.

transformers also loads a Mistral that has `layer_types` as one. In NeMo it is a MistralModel with
`window_attn_skip_freq`, a list with a 1 for each layer that has the window.
"""

from __future__ import annotations

from nemo_minitron.artifacts.json_types import HfConfig, JsonFields, JsonObject
from nemo_minitron.families.keys import FULL, SLIDING, layer_types
from nemo_minitron.families.mistral import Mistral
from nemo_minitron.families.translate import fixed, hf_layer_types


class Ministral(Mistral):
    model_type = "ministral"
    hf_class = "MinistralForCausalLM"
    nemo_fixed = fixed("window_size", "window_attn_skip_freq", "seq_len_interpolation_factor")

    def windows(self, config: HfConfig) -> JsonObject:
        """As in Family. The list is there even if all layers are alike, so that the checkpoint is a Ministral's."""
        fields = super().windows(config)
        every = SLIDING if fields["window_size"] else FULL
        kinds = layer_types(config) or [every] * self.read_sizes(config)["num_layers"]
        return fields | {"window_attn_skip_freq": [int(kind == SLIDING) for kind in kinds]}

    def claims(self, fields: JsonFields) -> bool:
        return fields.get("window_attn_skip_freq") is not None

    def from_nemo(self, fields: JsonFields) -> JsonObject:
        return super().from_nemo(fields) | {"layer_types": hf_layer_types(fields)}
