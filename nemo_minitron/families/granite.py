"""Granite: Granite 3 and all that transformers loads as GraniteForCausalLM: Llama with four multipliers.

Megatron-core 0.19 multiplies embeddings and logits (its fields for MuP), and has a scale of the softmax. The residual
multiplier r needs no field: a stream that is divided by r everywhere has the same norms, if their epsilon is divided by
r squared. So the embedding's multiplier is divided by r too, each layer adds its output as it is, and no weight
changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from nemo_minitron.artifacts.json_types import HfConfig, JsonFields, JsonObject
from nemo_minitron.errors import InputError
from nemo_minitron.families.base import LLAMA_DEFAULTS
from nemo_minitron.families.llama import Llama
from nemo_minitron.families.translate import fixed

MULTIPLIERS: JsonObject = dict.fromkeys(
    ("attention_multiplier", "embedding_multiplier", "logits_scaling", "residual_multiplier"), 1.0
)


class Granite(Llama):
    model_type = "granite"
    hf_class = "GraniteForCausalLM"
    hosts: ClassVar[tuple[str, ...]] = ("bridge",)
    defaults = LLAMA_DEFAULTS | MULTIPLIERS
    nemo_fixed = fixed("add_bias_linear", "seq_len_interpolation_factor", "softmax_scale", use_mup=True)
    multiples: ClassVar[Mapping[str, int | str]] = {}

    def nemo_config(self, config: HfConfig) -> tuple[str, JsonObject]:
        self.architecture(config)
        raise InputError(
            f"NeMo's Megatron-core has no multipliers of embeddings and logits, which a {self.hf_class} has; "
            "Megatron-Bridge's has them: give --host bridge"
        )

    def bridge_config(self, config: HfConfig) -> JsonObject:
        _, fields = super().nemo_config(config)
        attention, embedding, logits, residual = (self.value(config, name) for name in MULTIPLIERS)
        return fields | {
            "layernorm_epsilon": fields["layernorm_epsilon"] / residual**2,
            "mup_base_hidden_size": fields["hidden_size"],  # of a model as wide as its base MuP changes nothing else
            "mup_embedding_mult": embedding / residual,
            "mup_output_mult": 1 / logits,
            "softmax_scale": attention,
            "use_mup": True,
        }

    def claims(self, fields: JsonFields) -> bool:
        return bool(fields.get("use_mup"))

    def from_nemo(self, fields: JsonFields) -> JsonObject:
        """As in Family, of a checkpoint of Bridge. The residual multiplier is 1 in it, as the others and the epsilon
        have taken it up: the same model in other numbers."""
        if fields["mup_base_hidden_size"] != fields["hidden_size"]:
            raise InputError(
                f"the model's mup_base_hidden_size is {fields['mup_base_hidden_size']!r}; a {self.hf_class} needs its "
                f"hidden_size, {fields['hidden_size']}"
            )
        return super().from_nemo(fields) | {
            "attention_multiplier": fields["softmax_scale"],
            "embedding_multiplier": fields["mup_embedding_mult"],
            "logits_scaling": 1 / fields["mup_output_mult"],
            "residual_multiplier": 1.0,
        }
