"""What Megatron-Bridge's provider is told of a model: the fields of NeMo's config, and what Bridge says otherwise.

Bridge has YaRN, which NeMo's configs have no place for. llama3's scaling is Megatron-core's own there, with fixed
numbers. Plain values only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from nemo_minitron.artifacts.json_types import HfConfig, JsonFields, JsonObject
from nemo_minitron.errors import InputError
from nemo_minitron.families import longrope
from nemo_minitron.families.base import Family
from nemo_minitron.families.translate import rope_field

# NeMo's fields of llama3's scaling -> the only value that Megatron-core's own has
LLAMA3: Mapping[str, float] = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 8192}


def bridge_fields(family: Family, config: HfConfig) -> JsonObject:
    """Field of Bridge's provider -> value, beside those of NeMo's own files; a function is given by its dotted name.

    Raises InputError if Megatron-core cannot represent the model.
    """
    if not family.rope_types:  # no positions, and no place for them in Bridge's provider
        return family.bridge_config(config)
    kind, rope = family.rope(config)
    yarn = kind == "yarn" and "linear" in family.rope_types  # transformers' class then reads every kind of scaling
    if yarn:
        family.architecture(config)  # checks the numbers of the scaling, too
    plain = {**config, "rope_scaling": None} if yarn else config
    fields = {**family.nemo_fixed, **family.bridge_config(plain)}
    if yarn:
        positions = family.value(config, "max_position_embeddings")
        return fields | {"rope_scaling": False} | yarn_fields(rope, positions)
    return _with_llama3(fields)


def yarn_fields(rope: JsonFields, positions: int) -> JsonObject:
    """The provider's fields for YaRN, with transformers' defaults. Raises InputError for an `attention_factor` other
    than the one that Megatron-core computes."""
    factor = rope_field(rope, "factor")
    both = bool(rope.get("mscale") and rope.get("mscale_all_dim"))
    mscale, every = (rope["mscale"], rope["mscale_all_dim"]) if both else (1.0, 0.0)
    computed = attention_of(factor, mscale) / attention_of(factor, every)
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
        "apply_rope_fusion": False,  # the fused rotation of packed rows has no scale
    }


def hf_yarn(fields: JsonFields) -> JsonObject:
    """`rope_scaling` of a provider's fields, as a config; empty if it is not by YaRN."""
    if fields.get("position_embedding_type") != "yarn" or longrope.of_bridge(fields):
        return {}
    scaling = {key: fields[f"yarn_{name}"] for name, key in _YARN.items()}
    if not scaling["mscale_all_dim"]:  # then transformers reads neither
        if scaling["mscale"] != 1:
            raise InputError(
                f"the checkpoint's yarn_mscale is {scaling['mscale']!r} and its yarn_mscale_all_dim 0, which no config "
                "of transformers can say; the nearest legal yarn_mscale is 1.0"
            )
        del scaling["mscale"], scaling["mscale_all_dim"]
    return {"rope_scaling": {"rope_type": "yarn", **scaling}}


_YARN = {  # the provider's field, without `yarn_` -> the key of `rope_scaling`
    "rotary_scaling_factor": "factor",
    "original_max_position_embeddings": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "correction_range_round_to_int": "truncate",
}


def attention_of(factor: float, mscale: float) -> float:
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
