"""The two forms of a Hugging Face config: what transformers 4 writes, and what transformers 5 writes.

transformers 4 keeps `rope_theta`, `partial_rotary_factor` and `rope_scaling` side by side; transformers 5 keeps all of
them in `rope_parameters`, and writes `dtype` in place of `torch_dtype`. Each version ignores the keys of the other, or
reads them with another precedence. So every config is read through `normalized` once, and every student's config is
written through `both_forms`, which says the same to both versions.
"""

from __future__ import annotations

from collections.abc import Mapping

from nemo_minitron.artifacts.json_types import HfConfig, JsonFields, JsonObject
from nemo_minitron.errors import InputError
from nemo_minitron.families.keys import FULL, SLIDING

# transformers 4 keeps these beside the scaling, transformers 5 within it
MOVED = ("rope_theta", "partial_rotary_factor")
_KIND = ("rope_type", "type")
# what transformers 5 writes under another name: model type -> its key -> transformers 4's, which both versions read
RENAMED: Mapping[str, Mapping[str, str]] = {"qwen3_moe": {"num_local_experts": "num_experts"}}
# model type with a rotary base of its own for layers with a window -> transformers 4's key of it; transformers 5 keeps
# a mapping for each kind of layer in `rope_parameters`
LOCAL_BASE: Mapping[str, str] = {"gemma3_text": "rope_local_base_freq"}


def normalized(config: HfConfig) -> JsonObject:
    """A config of either form in the form of transformers 4; a config that already has that form is returned as it is.

    Raises InputError if both forms are present and contradict each other, if a field has the wrong type, and if the
    rotary embeddings differ between the types of layers.
    """
    result = dict(config)
    dtype = result.pop("dtype", None)
    if dtype is not None:
        _agree("torch_dtype", result.get("torch_dtype"), "dtype", dtype)
        result["torch_dtype"] = dtype
    for newer, older in RENAMED.get(str(result.get("model_type")), {}).items():
        value = result.pop(newer, None)
        if value is not None:
            _agree(older, result.get(older), newer, value)
            result[older] = value
    scaling = _mapping("rope_scaling", result.get("rope_scaling"))
    parameters = _mapping("rope_parameters", result.pop("rope_parameters", None))
    local = LOCAL_BASE.get(str(result.get("model_type")))
    parameters = _of_full_layers(parameters, local, result) if local else _of_all_layers(parameters)
    if not parameters and not scaling.keys() & set(MOVED):
        return result
    if "partial_rotary_factor" in parameters and "rope_theta" not in result:
        # only transformers 5 wrote this config; it writes the default factor of its class beside the model's own
        result.pop("partial_rotary_factor", None)
    for name in MOVED:
        _take_out(name, parameters, "rope_parameters", result)
        _take_out(name, scaling, "rope_scaling", result)
    rope_mappings = [_with_kind(fields) for fields in (scaling, parameters) if fields]
    if len(rope_mappings) == 2:
        _agree("rope_scaling", rope_mappings[0], "rope_parameters", rope_mappings[1])
    rope = rope_mappings[0] if rope_mappings else {}
    result["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    return result


def both_forms(config: HfConfig, rope_theta: float, partial_rotary_factor: float | None) -> JsonObject:
    """A normalized config with the keys of transformers 5 beside those of transformers 4.

    `rope_theta`, `partial_rotary_factor`: the model's values, which the config may leave to a default; the factor is
    None for a model that rotates the whole head.
    """
    result = dict(config)
    parameters = _with_kind(_mapping("rope_scaling", config.get("rope_scaling")))
    parameters |= {"rope_type": parameters.get("rope_type", "default"), "rope_theta": rope_theta}
    if partial_rotary_factor is not None:
        parameters["partial_rotary_factor"] = partial_rotary_factor
    result["rope_parameters"] = parameters
    if result.get("torch_dtype") is not None:
        result["dtype"] = result["torch_dtype"]
    return result


def _mapping(name: str, value: object) -> JsonObject:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InputError(f"the config's {name} is {value!r}; it must be a mapping or null")
    return dict(value)


def _of_all_layers(parameters: JsonObject) -> JsonObject:
    """The one mapping in `rope_parameters`, which may hold a mapping for each type of layer (Gemma 3's form)."""
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    if not nested:
        return parameters
    if len(nested) < len(parameters):
        raise InputError("the config's rope_parameters mixes fields with types of layers; it must have one kind")
    if any(value != nested[0] for value in nested):
        raise InputError(
            f"the config's rope_parameters differs between {' and '.join(parameters)}; models with one rotary "
            "embedding for all layers are supported"
        )
    return dict(nested[0])


def _of_full_layers(parameters: JsonObject, local: str, config: JsonObject) -> JsonObject:
    """The mapping of the layers without a window; the base of those with one goes to its place in `config`."""
    if not parameters:
        return {}
    if not parameters.keys() <= {FULL, SLIDING}:
        raise InputError(
            f"the config's rope_parameters has {', '.join(map(str, parameters))}; it needs a mapping for {FULL} and "
            f"one for {SLIDING}"
        )
    windowed = _with_kind(_mapping(f"rope_parameters.{SLIDING}", parameters.get(SLIDING)))
    _take_out("rope_theta", windowed, f"rope_parameters.{SLIDING}", config, local)
    if windowed.get("rope_type", "default") != "default":
        raise InputError(f"the config's rope_parameters.{SLIDING} is {windowed!r}; it must be of the type 'default'")
    return _mapping(f"rope_parameters.{FULL}", parameters.get(FULL))


def _take_out(name: str, fields: JsonObject, place: str, config: JsonObject, to: str = "") -> None:
    """Moves a field of `fields` to the place where transformers 4 keeps it, the key `to` (else its own name)."""
    value, to = fields.pop(name, None), to or name
    if value is not None:
        _agree(to, config.get(to), f"{place}.{name}", value)
        config[to] = value


def _with_kind(fields: JsonFields) -> JsonObject:
    """The fields of a scaling with `rope_type` in place of the older `type`."""
    if not fields:
        return {}
    kind = fields.get("rope_type", fields.get("type", "default"))
    return {"rope_type": kind, **{name: value for name, value in fields.items() if name not in _KIND}}


def _agree(name: str, value: object, other: str, other_value: object) -> None:
    """Raises InputError if both forms give a value and the values differ."""
    if value is not None and value != other_value:
        raise InputError(
            f"the config's {name} is {value!r} and its {other} is {other_value!r}; transformers 4 would "
            "read the first, transformers 5 the second: remove the wrong one"
        )
