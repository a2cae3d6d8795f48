"""Seed-OSS: Seed-OSS-36B and all that transformers loads as SeedOssForCausalLM: Llama with biases in q, k and v alone.

NeMo has no class of its own for it: the model is NeMo's LlamaModel with `add_qkv_bias`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from nemo_minitron.artifacts.json_types import HfConfig, JsonFields, JsonObject
from nemo_minitron.errors import InputError
from nemo_minitron.families.base import LLAMA_DEFAULTS, Family
from nemo_minitron.families.llama import Llama
from nemo_minitron.families.translate import fixed

_BIASES = {"attention_bias": True, "attention_out_bias": False, "mlp_bias": False}  # transformers' defaults


class SeedOss(Llama):
    model_type = "seed_oss"
    hf_class = "SeedOssForCausalLM"
    defaults = LLAMA_DEFAULTS | _BIASES | {
        "head_dim": 128,
        "max_position_embeddings": 524288,
        "num_key_value_heads": 8,
    }  # fmt: skip
    nemo_fixed = fixed("seq_len_interpolation_factor", add_qkv_bias=True)
    reads = frozenset()
    multiples: ClassVar[Mapping[str, int | str]] = {}
    no_effect = frozenset({"residual_dropout"})  # acts only in training

    def features(self, config: HfConfig) -> JsonObject:
        return Family.features(self, config) | {
            "qkv_bias": bool(self.value(config, "attention_bias")),
            "attention_output_bias": bool(self.value(config, "attention_out_bias")),
            "mlp_bias": bool(self.value(config, "mlp_bias")),
        }

    def nemo_config(self, config: HfConfig) -> tuple[str, JsonObject]:
        """As in Family. With other biases than Seed-OSS has, NeMo's class would be a Llama's again."""
        given = {name: bool(self.value(config, name)) for name in _BIASES}
        if given != _BIASES:
            raise InputError(
                f"a {self.hf_class} in NeMo's {self.nemo_model} has biases in q, k and v alone: attention_bias true, "
                f"attention_out_bias and mlp_bias false; this one has {given}"
            )
        return super().nemo_config(config)

    def claims(self, fields: JsonFields) -> bool:
        return bool(fields.get("add_qkv_bias"))

    def from_nemo(self, fields: JsonFields) -> JsonObject:
        return super().from_nemo(fields) | _BIASES
