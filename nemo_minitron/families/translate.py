"""Fields of a Hugging Face config <-> fields of NeMo's GPTConfig, shared by the families. Plain values only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts.json_types import HfConfig, Json, JsonFields, JsonObject
from nemo_minitron.errors import InputError, nearest
from nemo_minitron.families.keys import FULL, SLIDING

ACTIVATIONS = {  # Hugging Face's name -> the function in NeMo's config
    "silu": "torch.nn.functional.silu",
    "gelu": "torch.nn.functional.gelu",
    "gelu_pytorch_tanh": "megatron.core.activations.fast_gelu",
    "relu": "torch.nn.functional.relu",
    "relu2": "nemo.collections.llm.fn.activation.squared_relu",
}
_FIXED = {
    "position_embedding_type": "rope",
    "rotary_interleaved": False,
    "rotary_percent": 1.0,
    "seq_len_interpolation_factor": None,
    "window_size": None,
    "window_attn_skip_freq": None,
    "normalization": "RMSNorm",
    "layernorm_zero_centered_gamma": False,
    "qk_layernorm": False,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "gated_linear_unit": True,
    "num_moe_experts": None,
    "softmax_scale": None,
    "softmax_type": "vanilla",
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "use_mup": False,
    "multi_latent_attention": False,
}
MTP = "layers of multi-token prediction are not supported: remove their tensors and set num_nextn_predict_layers to 0"


def fixed(*read: str, **others: object) -> JsonObject:
    """NeMo's field -> its value in a Llama-like model, without the fields that the family reads (`read`), and with
    `others` in place of the usual values."""
    return {name: value for name, value in _FIXED.items() if name not in read} | others


def check_fixed(fields: JsonFields, values: JsonFields, hf_class: str) -> None:
    """Raises InputError if the Hugging Face class cannot represent the NeMo model."""
    for name, value in values.items():
        given = fields.get(name, value)
        if given != value:
            raise InputError(f"the NeMo model's {name} is {given!r}; a {hf_class} needs {value!r}")


def hf_sizes(fields: JsonFields, sizes: Mapping[str, str]) -> JsonObject:
    """Hugging Face field -> size; `sizes`: Architecture field -> Hugging Face field. Sizes that NeMo leaves to Megatron
    are computed here."""
    derived = {
        "num_query_groups": fields["num_attention_heads"],
        "head_dim": fields["hidden_size"] // fields["num_attention_heads"],
        "ffn_hidden_size": 4 * fields["hidden_size"],
        "moe_ffn_hidden_size": fields["ffn_hidden_size"],
    }
    hf_fields = {}
    for size, name in sizes.items():
        value = fields["kv_channels" if size == "head_dim" else size]
        hf_fields[name] = derived.get(size) if value is None else value
    return hf_fields


def nemo_biases(a: Architecture, hf_class: str) -> dict[str, bool]:
    """NeMo's fields for biases. Raises InputError if Megatron cannot have biases in these places."""
    if a.attention_output_bias != a.mlp_bias or (a.mlp_bias and not a.qkv_bias):
        raise InputError(
            "Megatron has biases in attention and MLP, in q, k and v alone, or nowhere; "
            f"this {hf_class} has them in {'the MLP' if a.mlp_bias else 'attention'} alone"
        )
    return {"add_bias_linear": a.mlp_bias, "add_qkv_bias": a.qkv_bias and not a.mlp_bias}


def nemo_activation(name: str, default: str) -> JsonObject:
    """NeMo's fields for an activation; none for the family's default, the only one that Megatron fuses. Raises
    InputError."""
    if name == default:
        return {}
    if name not in ACTIVATIONS:
        raise InputError(f"hidden_act '{name}' is unknown; {nearest(str(name), ACTIVATIONS)}")
    return {"activation_func": ACTIVATIONS[name], "bias_activation_fusion": False}


def hf_activation(function: str | None, default: str) -> str:
    """Hugging Face's name of the function that a NeMo context gives; the module it is imported from does not matter."""
    if function is None:
        return default
    last = function.rsplit(".", 1)[-1]
    for name, known in ACTIVATIONS.items():
        if known.rsplit(".", 1)[-1] == last:
            return name
    raise InputError(f"the NeMo model's activation '{function}' is not one of {', '.join(ACTIVATIONS)}")


def rope_of(config: HfConfig) -> tuple[str, JsonFields]:
    """Kind and fields of `rope_scaling`. Raises InputError if it is not a mapping."""
    rope = config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise InputError(f"the config's rope_scaling is {rope!r}; it must be a mapping or null")
    return str(rope.get("rope_type", rope.get("type", "default"))), rope


def rope_field(rope: JsonFields, name: str) -> Json:
    if name not in rope:
        raise InputError(f"the config's rope_scaling has no '{name}'")
    return rope[name]


def nemo_rope(config: HfConfig, legal: tuple[str, ...], nemo_model: str, of_bridge: Sequence[str] = ()) -> JsonObject:
    """NeMo's fields for `rope_scaling`. Raises InputError for a kind that NeMo's class lacks, and names Megatron-Bridge
    if that has it (one of `of_bridge`, or YaRN)."""
    kind, rope = rope_of(config)
    if kind not in legal:
        elsewhere = kind in of_bridge or (kind == "yarn" and "linear" in legal)
        other = "; Megatron-Bridge has it: give --host bridge" if elsewhere else ""
        raise InputError(
            f"rope_scaling '{kind}' is not supported by NeMo's {nemo_model}; it has {', '.join(legal)}{other}"
        )
    return {"seq_len_interpolation_factor": float(rope_field(rope, "factor"))} if kind == "linear" else {}


def hf_rope(fields: JsonFields) -> JsonObject:
    factor = fields.get("seq_len_interpolation_factor")
    return {"rope_scaling": {"rope_type": "linear", "factor": factor}} if factor else {}


def check_choice(fields: JsonFields) -> None:
    """Raises InputError if a token goes to one expert whose probability is normalized, which is then always 1."""
    if fields["moe_router_topk"] == 1:
        raise InputError(
            "num_experts_per_tok is 1 and the router normalizes the probabilities of a token's experts, which Megatron "
            "refuses; the nearest legal num_experts_per_tok is 2"
        )


def nemo_window(window: int | None, kinds: Sequence[str] = ()) -> JsonObject:
    """NeMo's fields for a sliding window of `window` tokens; None: no window.

    `kinds`: transformers' name for the attention of each layer, if the layers may differ; without it, all layers have
    the window. transformers counts the current token into the window, Transformer Engine's `window_size[0]` does not.
    Under context parallelism Transformer Engine then needs `a2a`. Raises InputError if a layer has a window of which
    the config does not say how long it is."""
    if kinds and SLIDING not in kinds:
        window = None
    elif kinds and not window:
        raise InputError(
            f"the config gives layers '{SLIDING}', and no sliding_window is in use; set it, and use_sliding_window "
            f"where the family has it, or make all layers '{FULL}'"
        )
    fields: JsonObject = {"window_size": [window - 1, 0] if window else None, "cp_comm_type": "a2a" if window else None}
    if window and FULL in kinds:
        fields["window_attn_skip_freq"] = [int(kind == SLIDING) for kind in kinds]
    return fields


def hf_window(fields: JsonFields) -> JsonObject:
    window = fields.get("window_size")
    return {"sliding_window": window[0] + 1 if window else None}


def hf_layer_types(fields: JsonFields) -> list[str]:
    """transformers' name for the attention of each layer, of a NeMo config's fields."""
    layers, skip = fields["num_layers"], fields.get("window_attn_skip_freq")
    if not fields.get("window_size"):
        return [FULL] * layers
    if isinstance(skip, int):  # Megatron's N: every N-th layer has no window
        skip = [int((layer + 1) % skip != 0) for layer in range(layers)]
    return [SLIDING if windowed else FULL for windowed in skip or [1] * layers]
