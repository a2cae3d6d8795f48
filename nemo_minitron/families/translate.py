"""Fields of a Hugging Face config <-> fields of NeMo's GPTConfig: what families share. Plain values only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_minitron.architecture import Architecture
from nemo_minitron.errors import InputError, nearest

ACTIVATIONS = {  # Hugging Face's name -> the function in NeMo's config
    "silu": "torch.nn.functional.silu",
    "gelu": "torch.nn.functional.gelu",
    "relu": "torch.nn.functional.relu",
    "relu2": "nemo.collections.llm.fn.activation.squared_relu",
}
_FIXED = {
    "position_embedding_type": "rope",
    "rotary_interleaved": False,
    "rotary_percent": 1.0,
    "seq_len_interpolation_factor": None,
    "window_size": None,
    "normalization": "RMSNorm",
    "layernorm_zero_centered_gamma": False,
    "qk_layernorm": False,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "gated_linear_unit": True,
    "num_moe_experts": None,
}


def fixed(*read: str, **others: Any) -> dict[str, Any]:
    """The values that NeMo's fields have in a Llama-like model, but for the fields that the family reads, and for
    `others`."""
    return {name: value for name, value in _FIXED.items() if name not in read} | others


def check_fixed(fields: Mapping[str, Any], values: Mapping[str, Any], hf_class: str) -> None:
    """Raises InputError for a NeMo model that is not what the Hugging Face class stands for."""
    for name, value in values.items():
        found = fields.get(name, value)
        if found != value:
            raise InputError(f"the NeMo model's {name} is {found!r}; a {hf_class} is one with {value!r}")


def hf_sizes(fields: Mapping[str, Any], sizes: Mapping[str, str]) -> dict[str, Any]:
    """Hugging Face's sizes; `sizes`: Architecture field -> Hugging Face field. What NeMo leaves to Megatron is
    written out."""
    derived = {
        "num_query_groups": fields["num_attention_heads"],
        "head_dim": fields["hidden_size"] // fields["num_attention_heads"],
        "ffn_hidden_size": 4 * fields["hidden_size"],
        "moe_ffn_hidden_size": fields["ffn_hidden_size"],
    }
    found = {}
    for size, name in sizes.items():
        value = fields["kv_channels" if size == "head_dim" else size]
        found[name] = derived.get(size) if value is None else value
    return found


def nemo_biases(a: Architecture, hf_class: str) -> dict[str, bool]:
    """Raises InputError for biases in other places than Megatron can have them."""
    if a.attention_output_bias != a.mlp_bias or (a.mlp_bias and not a.qkv_bias):
        raise InputError(
            "Megatron has biases in attention and MLP, in q, k and v alone, or nowhere; "
            f"this {hf_class} has them in {'the MLP' if a.mlp_bias else 'attention'} alone"
        )
    return {"add_bias_linear": a.mlp_bias, "add_qkv_bias": a.qkv_bias and not a.mlp_bias}


def nemo_activation(name: str, default: str) -> dict[str, Any]:
    """Nothing where it is NeMo's own; Megatron's fused ones are for those alone. Raises InputError."""
    if name == default:
        return {}
    if name not in ACTIVATIONS:
        raise InputError(f"hidden_act '{name}' is not one that is known; {nearest(str(name), ACTIVATIONS)}")
    return {"activation_func": ACTIVATIONS[name], "bias_activation_fusion": False}


def hf_activation(function: str | None, default: str) -> str:
    """Hugging Face's name of a function that a NeMo context names, wherever it is imported from."""
    if function is None:
        return default
    last = function.rsplit(".", 1)[-1]
    for name, known in ACTIVATIONS.items():
        if known.rsplit(".", 1)[-1] == last:
            return name
    raise InputError(f"the NeMo model's activation '{function}' is not one of {', '.join(ACTIVATIONS)}")


def rope_of(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Kind and fields of `rope_scaling`. Raises InputError where it is no mapping."""
    rope = config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise InputError(f"the config's rope_scaling is {rope!r}; it must be a mapping or null")
    return str(rope.get("rope_type", rope.get("type", "default"))), rope


def rope_field(rope: Mapping[str, Any], name: str) -> Any:
    if name not in rope:
        raise InputError(f"the config's rope_scaling has no '{name}'")
    return rope[name]


def nemo_rope(config: Mapping[str, Any], legal: tuple[str, ...], nemo_model: str) -> dict[str, Any]:
    """Raises InputError for a kind of scaling that NeMo's class does not have."""
    kind, rope = rope_of(config)
    if kind not in legal:
        raise InputError(f"rope_scaling '{kind}' is not in NeMo's {nemo_model}; it has {', '.join(legal)}")
    return {"seq_len_interpolation_factor": float(rope_field(rope, "factor"))} if kind == "linear" else {}


def hf_rope(fields: Mapping[str, Any]) -> dict[str, Any]:
    factor = fields.get("seq_len_interpolation_factor")
    return {"rope_scaling": {"rope_type": "linear", "factor": factor}} if factor else {}


def nemo_window(window: int | None) -> dict[str, Any]:
    """transformers looks back over `window` tokens with the present one, Transformer Engine over `window_size[0]`
    tokens beside it; under context parallelism it then needs `a2a`."""
    return {"window_size": [window - 1, 0] if window else None, "cp_comm_type": "a2a" if window else None}


def hf_window(fields: Mapping[str, Any]) -> dict[str, Any]:
    window = fields.get("window_size")
    return {"sliding_window": window[0] + 1 if window else None}
