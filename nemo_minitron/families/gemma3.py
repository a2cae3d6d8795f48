"""Gemma 3, text: all that transformers loads as Gemma3ForCausalLM, and the text of Gemma3ForConditionalGeneration.

Gemma 2 without caps, with norms of queries and keys, and with two rotary bases: one of the layers with a window
(`rope_local_base_freq`), and one of the others (`rope_theta`), whose positions may be scaled. Five of six layers have a
window. transformers 5 writes the bases as `rope_parameters`, a mapping for each kind of layer (`forms.py`).
"""

from __future__ import annotations

from typing import ClassVar

from nemo_minitron.artifacts.json_types import HfConfig, JsonFields, JsonObject
from nemo_minitron.errors import InputError
from nemo_minitron.families.forms import LOCAL_BASE
from nemo_minitron.families.gemma2 import CAPS, LOCAL, Gemma2
from nemo_minitron.families.keys import FULL, SLIDING
from nemo_minitron.families.translate import fixed

_ATTENTION = "model.layers.{i}.self_attn."
_BASE, _PERIOD = LOCAL_BASE["gemma3_text"], "sliding_window_pattern"


class Gemma3(Gemma2):
    model_type = "gemma3_text"
    hf_class = "Gemma3ForCausalLM"
    nemo_model = "Gemma3Model"
    nemo_class = "Gemma3Config"
    tensors = Gemma2.tensors | {
        f"{_ATTENTION}q_norm.weight": ("layers.{i}.q_norm.weight",),
        f"{_ATTENTION}k_norm.weight": ("layers.{i}.k_norm.weight",),
    }
    defaults: ClassVar[JsonObject] = Gemma2.defaults | dict.fromkeys(CAPS) | {
        "max_position_embeddings": 131_072, "rope_theta": 1e6, "vocab_size": 262_208, _BASE: 1e4,
    }  # fmt: skip
    nemo_fixed = fixed(
        "seq_len_interpolation_factor", "softmax_scale", "window_size", "window_attn_skip_freq",
        layernorm_zero_centered_gamma=True, qk_layernorm=True,
    )  # fmt: skip
    only: ClassVar[JsonObject] = Gemma2.only | dict.fromkeys(CAPS)
    reads: ClassVar[frozenset[str]] = Gemma2.reads | {_PERIOD}
    no_effect: ClassVar[frozenset[str]] = Gemma2.no_effect | {"_sliding_window_pattern"}

    def features(self, config: HfConfig) -> JsonObject:
        return super().features(config) | {"qk_norm": True}

    def period(self, config: HfConfig) -> int:
        period = config.get(_PERIOD, 6)
        if not isinstance(period, int) or isinstance(period, bool) or period < 1:
            raise InputError(f"the config's {_PERIOD} is {period!r}; it must be a whole number of at least 1")
        return period

    def written(self, config: HfConfig) -> JsonObject:
        """As in Family, with both bases in the form of either version."""
        result, base = super().written(config), self.value(config, _BASE)
        kinds = {FULL: result["rope_parameters"], SLIDING: {"rope_type": "default", "rope_theta": base}}
        return result | {_BASE: base, "rope_theta": self.value(config, "rope_theta"), "rope_parameters": kinds}

    def bridge_config(self, config: HfConfig) -> JsonObject:
        return super().bridge_config(config) | {LOCAL: self.value(config, _BASE)}

    def claims(self, fields: JsonFields) -> bool:
        return fields.get(LOCAL) is not None

    def from_nemo(self, fields: JsonFields) -> JsonObject:
        return super().from_nemo(fields) | {_BASE: fields.get(LOCAL)}
