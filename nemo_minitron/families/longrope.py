"""longrope (2402.13753): each rotary frequency is divided by a factor of its own.

There are two sets of factors: for sequences up to the length of the original training, and for longer ones. Queries and
keys are scaled by a number that follows from both lengths.

transformers 4 allows three keys in the scaling (`type`, `short_factor`, `long_factor`) and takes the lengths from the
config. So do we: another scale than the one that follows from the lengths would mean something else to transformers 4.
"""

from __future__ import annotations

import math

from nemo_minitron.artifacts.json_types import HfConfig, Json, JsonFields, JsonObject
from nemo_minitron.errors import InputError
from nemo_minitron.families.translate import rope_field, rope_of

KINDS = ("longrope", "su")  # "su": the name in older configs
FACTORS = ("short_factor", "long_factor")
ORIGINAL, LONGEST = "original_max_position_embeddings", "max_position_embeddings"
FIELDS = {name: f"longrope_{name}" for name in (*FACTORS, ORIGINAL, LONGEST)}  # of the provider on Megatron-Bridge


def checked(rope: JsonFields, longest: int, original: int, frequencies: int) -> JsonObject:
    """The factors and the two lengths, by their names in a Hugging Face config.

    `frequencies`: the number of rotary frequencies of a head. Raises InputError for factors that are missing or do not
    fit, and for a key that contradicts the lengths."""
    if original < 2:
        raise InputError(f"the config's {ORIGINAL} is {original}; the nearest length that longrope has is 2")
    factors = {name: _factors(name, rope_field(rope, name), frequencies) for name in FACTORS}
    follows = {ORIGINAL: original, "factor": longest / original, "attention_factor": attention(longest, original)}
    for name, value in follows.items():
        given = rope.get(name)
        if given is not None and not (isinstance(given, (int, float)) and math.isclose(given, value, rel_tol=1e-7)):
            raise InputError(
                f"rope_scaling 'longrope' has {name} {given!r}, and transformers 4 takes {value!r} from the config's "
                f"{LONGEST} and {ORIGINAL}; remove it if it was meant to be that"
            )
    return factors | {ORIGINAL: original, LONGEST: longest}


def _factors(name: str, values: Json, frequencies: int) -> list[float]:
    numbers = isinstance(values, list) and all(isinstance(v, (int, float)) and 0 < v < math.inf for v in values)
    if not numbers or len(values) != frequencies:
        raise InputError(
            f"the {name} of rope_scaling 'longrope' must be {frequencies} numbers above 0, one for each rotary "
            f"frequency of a head; it has {f'{len(values)} values' if isinstance(values, list) else repr(values)}"
        )
    return values


def attention(longest: int, original: int) -> float:
    """What queries and keys are multiplied by."""
    return 1.0 if longest <= original else math.sqrt(1 + math.log(longest / original) / math.log(original))


def bridge_fields(found: JsonFields) -> JsonObject:
    """The provider's fields of what `checked` found.

    Megatron scales queries and keys for YaRN alone. So its fields of YaRN say how much; the frequencies are set from
    the other fields, in the place of YaRN's (`hosts.bridge.longrope`)."""
    longest, original = found[LONGEST], found[ORIGINAL]
    extension = max(1.0, longest / original)
    scale = (attention(longest, original) - 1) * 10 / math.log(extension) if extension > 1 else 1.0
    return {
        **{field: found[name] for name, field in FIELDS.items()},
        "position_embedding_type": "yarn",
        "yarn_rotary_scaling_factor": extension,
        "yarn_original_max_position_embeddings": original,
        "yarn_beta_fast": 32.0,
        "yarn_beta_slow": 1.0,
        "yarn_mscale": scale,
        "yarn_mscale_all_dim": 0.0,
        "yarn_correction_range_round_to_int": True,
        "apply_rope_fusion": False,  # the fused rotation of packed rows has no scale
    }


def of_bridge(fields: JsonFields) -> JsonObject:
    """The Hugging Face config's keys of a provider's fields; none of a model without longrope."""
    found = {name: fields.get(field) for name, field in FIELDS.items()}
    if found[FACTORS[0]] is None:
        return {}
    lengths = {name: found.pop(name) for name in (ORIGINAL, LONGEST)}
    return lengths | written(found)


def written(rope: JsonFields) -> JsonObject:
    """`rope_scaling` in the only form that transformers 4 takes; transformers 5 reads the same from it."""
    return {"rope_scaling": {"type": KINDS[0], **{name: rope[name] for name in FACTORS}}}


def is_longrope(config: HfConfig) -> bool:
    return rope_of(config)[0] in KINDS
