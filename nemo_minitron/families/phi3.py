"""Phi-3: Phi-3, Phi-4 and all that transformers loads as Phi3ForCausalLM: fused q, k, v and fused gate, up."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts.json_types import HfConfig, JsonFields, JsonObject
from nemo_minitron.errors import InputError
from nemo_minitron.families import longrope
from nemo_minitron.families.base import LLAMA_DEFAULTS, NEMO_FIELDS, Family
from nemo_minitron.families.stored import LLAMA_TENSORS
from nemo_minitron.families.translate import fixed, hf_window, nemo_window, rope_field, rope_of

_LAYER = "model.layers.{i}."
_FUSED = {
    f"{_LAYER}self_attn.qkv_proj.weight": ("layers.{i}.q.weight", "layers.{i}.k.weight", "layers.{i}.v.weight"),
    f"{_LAYER}mlp.gate_up_proj.weight": ("layers.{i}.gate.weight", "layers.{i}.up.weight"),
}
_PARTS = {part for parts in _FUSED.values() for part in parts}


class Phi3(Family):
    model_type = "phi3"
    hf_class = "Phi3ForCausalLM"
    nemo_model = "Phi3Model"
    nemo_class = "Phi3Config"
    tensors = _FUSED | {name: parts for name, parts in LLAMA_TENSORS.items() if not _PARTS & set(parts)}
    defaults = LLAMA_DEFAULTS | {
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 1.0,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
    }
    nemo_fields = NEMO_FIELDS | {"rotary_percent": "partial_rotary_factor"}
    nemo_fixed = fixed("rotary_percent", "window_size")
    rope_types = ("default",)
    rope_types_of_bridge = longrope.KINDS
    no_effect = frozenset({"embd_pdrop", "resid_pdrop"})  # dropout acts only in training

    def config(self, architecture: Architecture, base: HfConfig, layers: Sequence[int] | None = None) -> JsonObject:
        """As in Family; also refuses what transformers' check of longrope's factors would refuse. That check uses
        hidden_size / heads, even if head_dim differs."""
        kind, rope = rope_of(base)
        if kind != "default":
            self._check_factors(architecture, kind, rope, self.value(base, "partial_rotary_factor"))
        return super().config(architecture, base, layers)

    def _check_factors(self, a: Architecture, kind: str, rope: JsonFields, part: float) -> None:
        factors = rope_field(rope, "short_factor")
        if not isinstance(factors, list):
            raise InputError(f"the short_factor of rope_scaling '{kind}' is {factors!r}; it must be a list")
        heads, wanted = a.num_attention_heads, len(factors)
        legal = [size for size in range(heads, 8 * wanted * heads) if _frequencies(size, heads, part) == wanted]
        if a.hidden_size not in legal:
            closest = min(legal, key=lambda size: abs(size - a.hidden_size), default=None)
            raise InputError(
                f"hidden_size {a.hidden_size} with {heads} heads is not legal: transformers needs one of the "
                f"{wanted} factors of rope_scaling '{kind}' for each pair of hidden_size / heads; the nearest "
                f"hidden_size is {closest}"
            )

    def longrope(self, config: HfConfig) -> JsonObject:
        """What `longrope.checked` finds in a config."""
        longest, original = (self.value(config, name) for name in (longrope.LONGEST, longrope.ORIGINAL))
        rotated = int(self.read_sizes(config)["head_dim"] * self.value(config, "partial_rotary_factor"))
        return longrope.checked(rope_of(config)[1], longest, original, rotated // 2)

    def bridge_config(self, config: HfConfig) -> JsonObject:
        """As in Family, with longrope, which NeMo's config has no place for."""
        if not longrope.is_longrope(config):
            return super().bridge_config(config)
        self.architecture(config)  # checks the numbers of the config
        plain = super().bridge_config({**config, "rope_scaling": None})
        return plain | longrope.bridge_fields(self.longrope(config))

    def written(self, config: HfConfig) -> JsonObject:
        """As in Family. transformers 5, too, takes longrope's factors from `rope_scaling` where it is there."""
        scaled = longrope.is_longrope(config)
        return super().written({**config, **longrope.written(self.longrope(config))} if scaled else config)

    def windows(self, config: HfConfig) -> JsonObject:
        return nemo_window(self.value(config, "sliding_window"))

    def from_nemo(self, fields: JsonFields) -> JsonObject:
        scaled = longrope.of_bridge(fields)
        plain = {**fields, "position_embedding_type": "rope"} if scaled else fields
        # the default padding token of transformers lies outside a small vocabulary
        return super().from_nemo(plain) | hf_window(fields) | scaled | {"pad_token_id": None}


def _frequencies(hidden: int, heads: int, part: float) -> int:
    """The number of rotary frequencies of a head, as transformers counts them."""
    return int(hidden // heads * part) // 2
