"""What Megatron-Bridge's provider is told of a model: the fields of NeMo's config, and what Bridge says otherwise.

Bridge has YaRN, which NeMo's configs have no place for. llama3's scaling is Megatron-core's own there, with fixed
numbers. Plain values only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from nemo_minitron.artifacts.json_types import HfConfig, JsonFields, JsonObject
from nemo_minitron.errors import InputError
from nemo_minitron.families.base import Family
from nemo_minitron.families.translate import rope_field, rope_of

# NeMo's fields of llama3's scaling -> the only value that Megatron-core's own has
LLAMA3: Mapping[str, float] = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 8192}


def bridge_fields(family: Family, config: HfConfig) -> JsonObject:
    """Field of Bridge's provider -> value, beside those of NeMo's own files; a function is given by its dotted name.

    Raises InputError if Megatron-core cannot represent the model.
    """
    kind, rope = rope_of(config)
    yarn = kind == "yarn" and "linear" in family.rope_types  # transformers' class then reads every kind of scaling
    if yarn:
        family.architecture(config)  # checks the numbers of the scaling, too
    plain = {**config, "rope_scaling": None} if yarn else config
    fields = {**family.nemo_fixed, **family.bridge_config(plain)}
    if yarn:
        positions = family.value(config, "max_position_embeddings")
        return fields | {"rope_scaling": False} | _yarn(rope, positions)
    return _with_llama3(fields)


def _yarn(rope: JsonFields, positions: int) -> JsonObject:
    """The provider's fields for YaRN, with transformers' defaults. Raises InputError for an `attention_factor` other
    than the one that Megatron-core computes."""
    factor = rope_field(rope, "factor")
    both = bool(rope.get("mscale") and rope.get("mscale_all_dim"))
    mscale, every = (rope["mscale"], rope["mscale_all_dim"]) if both else (1.0, 0.0)
    computed = _attention(factor, mscale) / _attention(factor, every)
    given = rope.get("attention_factor")
    if given is not None and not math.isclose(given, computed, rel_tol=1e-7):
        raise InputError(
            f"rope_scaling 'yarn' has attention_factor {given!r}, and Megatron-core computes {computed!r} from the "
            "factor; remove it if it was meant to be that"
        )
    return {
        "position_embedding_type": "yarn",
        "yarn_rotary_scaling_factor": float(factor),
        "yarn_original_max_position_embeddings": rope.get("original_max_position_embeddings") or positions,
        "yarn_beta_fast": float(rope.get("beta_fast") or 32),
        "yarn_beta_slow": float(rope.get("beta_slow") or 1),
        "yarn_mscale": mscale,
        "yarn_mscale_all_dim": every,
        "yarn_correction_range_round_to_int": bool(rope.get("truncate", True)),
    }


def _attention(factor: float, mscale: float) -> float:
    """What YaRN multiplies queries and keys by, of a factor of the context."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _with_llama3(fields: JsonObject) -> JsonObject:
    """Megatron-core's fields in place of NeMo's for llama3's scaling. Raises InputError for other numbers."""
    factor = fields.pop("scale_factor", None)
    for name, legal in LLAMA3.items():
        value = fields.pop(name, legal)
        if value != legal:
            raise InputError(
                f"rope_scaling 'llama3' has {name} {value}, and Megatron-Bridge's is always {legal}; give --host nemo"
            )
    return fields | {"rope_scaling": factor is not None, "rope_scaling_factor": 1.0 if factor is None else factor}
