"""The two forms of a Hugging Face config: what transformers 4 writes, and what transformers 5 writes.

transformers 4 keeps `rope_theta`, `partial_rotary_factor` and `rope_scaling` side by side; transformers 5 keeps all of
them in `rope_parameters`, and writes `dtype` in place of `torch_dtype`. Each version ignores the keys of the other, or
reads them with another precedence. So every config is read through `normalized` once, and every student's config is
written through `both_forms`, which says the same to both versions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_minitron.errors import InputError

Config = Mapping[str, Any]

MOVED = ("rope_theta", "partial_rotary_factor")  # beside the scaling in transformers 4, within it in transformers 5
_KIND = ("rope_type", "type")


def normalized(config: Config) -> dict[str, Any]:
    """A config of either form in the form of transformers 4; one that already has it comes back as it is.

    Raises InputError where the two forms stand side by side and contradict each other, where a field has the wrong
    type, and for rotary embeddings that differ between the types of layers.
    """
    result = dict(config)
    dtype = result.pop("dtype", None)
    if dtype is not None:
        _agree("torch_dtype", result.get("torch_dtype"), "dtype", dtype)
        result["torch_dtype"] = dtype
    scaling = _mapping("rope_scaling", result.get("rope_scaling"))
    parameters = _of_all_layers(_mapping("rope_parameters", result.pop("rope_parameters", None)))
    if not parameters and not scaling.keys() & set(MOVED):
        return result
    if "partial_rotary_factor" in parameters and "rope_theta" not in result:
        # transformers 5 alone wrote it, and writes its class's default factor beside the model's own
        result.pop("partial_rotary_factor", None)
    for name in MOVED:
        _take_out(name, parameters, "rope_parameters", result)
        _take_out(name, scaling, "rope_scaling", result)
    plain = [_with_kind(fields) for fields in (scaling, parameters) if fields]
    if len(plain) == 2:
        _agree("rope_scaling", plain[0], "rope_parameters", plain[1])
    found = plain[0] if plain else {}
    result["rope_scaling"] = None if found.get("rope_type", "default") == "default" else found
    return result


def both_forms(config: Config, rope_theta: float, partial_rotary_factor: float | None) -> dict[str, Any]:
    """A normalized config with the keys of transformers 5 beside those of transformers 4.

    `rope_theta`, `partial_rotary_factor`: the model's own, which the config may leave to a default; None for a model
    that rotates all of a head.
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


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InputError(f"the config's {name} is {value!r}; it must be a mapping or null")
    return dict(value)


def _of_all_layers(parameters: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters`, which may hold one mapping for each type of layer (Gemma 3's form)."""
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


def _take_out(name: str, fields: dict[str, Any], place: str, config: dict[str, Any]) -> None:
    """Moves a field of `fields` to where transformers 4 has it."""
    value = fields.pop(name, None)
    if value is not None:
        _agree(name, config.get(name), f"{place}.{name}", value)
        config[name] = value


def _with_kind(fields: Mapping[str, Any]) -> dict[str, Any]:
    """With `rope_type` in place of the older `type`."""
    if not fields:
        return {}
    kind = fields.get("rope_type", fields.get("type", "default"))
    return {"rope_type": kind, **{name: value for name, value in fields.items() if name not in _KIND}}


def _agree(name: str, value: Any, other: str, said: Any) -> None:
    if value is not None and value != said:
        raise InputError(
            f"the config's {name} is {value!r} and its {other} is {said!r}; transformers 4 would read the one, "
            "transformers 5 the other: remove the wrong one"
        )
