"""Mistral: Mistral 7B, Mistral-NeMo and all that transformers loads as MistralForCausalLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_minitron.families.base import Config, Family, nemo_sizes
from nemo_minitron.families.llama import common_config, common_fields


class Mistral(Family):
    model_type = "mistral"
    hf_class = "MistralForCausalLM"
    nemo_model = "MistralModel"

    def default_sizes(self, config: Config) -> dict[str, int]:
        return super().default_sizes(config) | {"num_query_groups": 8}

    def nemo_config(self, config: Config) -> tuple[str, dict[str, Any]]:
        # transformers looks back over `sliding_window` tokens with the present one, Transformer Engine over
        # `window_size[0]` tokens beside it.
        window = config.get("sliding_window")
        fields = {"window_size": [window - 1, 0] if window else None, "cp_comm_type": "a2a" if window else None}
        return "MistralConfig7B", nemo_sizes(self.architecture(config)) | common_fields(config) | fields

    def from_nemo(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        window = fields.get("window_size")
        return common_config(self, fields) | {"sliding_window": window[0] + 1 if window else None}
