"""Megatron's fields for a Hugging Face config, from the tables of its family.

Bridge's own conversion of a config leaves out what its authors did not meet: another activation, windows of Qwen3-MoE,
biases, dense layers among mixtures, linear scaling of positions. So the tables that describe a family to NeMo, whose
fields have the same names, are written over what Bridge has read. Importing this file loads neither torch nor Megatron.
"""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Mapping
from typing import Any

from nemo_minitron.errors import InputError
from nemo_minitron.families import family_of

OF_NEMO = {  # a name in the families' tables -> the same function of Megatron's
    "nemo.collections.llm.fn.activation.squared_relu": "megatron.core.activations.squared_relu"
}
LLAMA3 = {  # the table's field -> Megatron's argument, and the only value that its GPTModel gives it
    "low_freq_factor": ("low_freq_factor", 1.0),
    "high_freq_factor": ("high_freq_factor", 4.0),
    "old_context_len": ("original_max_position_embeddings", 8192),
}
OF_LLAMA = {  # as Bridge's class for Llama has it, and its mixtures' dispatch
    "apply_rope_fusion": True, "bias_activation_fusion": True, "bias_dropout_fusion": True,
    "masked_softmax_fusion": True, "persist_layer_norm": True,
    "moe_router_load_balancing_type": "aux_loss", "moe_token_dispatcher_type": "alltoall",
}  # fmt: skip
WITHOUT_EFFECT = ("max_position_embeddings",)  # a field of NeMo's classes; rotary positions do not read it


def named_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Field of Bridge's GPTModelProvider -> its value for this model; functions by their dotted names.

    No layer drops activations, as in NeMo's classes. Raises InputError if Megatron or Bridge cannot represent the
    model.
    """
    family = family_of(config)
    _, named = family.nemo_config(config)
    fields: dict[str, Any] = {**family.nemo_fixed, "hidden_dropout": 0.0, "attention_dropout": 0.0, **named}
    if name := fields.get("activation_func"):
        fields["activation_func"] = OF_NEMO.get(name, name)
    if "scale_factor" in fields:
        fields |= _llama3(fields, family.hf_class)
    return {name: value for name, value in fields.items() if name not in WITHOUT_EFFECT}


def _llama3(fields: dict[str, Any], hf_class: str) -> dict[str, Any]:
    """Megatron's fields for the scaling of Llama 3; the table's own leave `fields`."""
    for name, (argument, legal) in LLAMA3.items():
        given = fields.pop(name)
        if given != legal:
            raise InputError(
                f"the {argument} of this {hf_class}'s rope_scaling is {given}; on Megatron-Bridge {legal} alone is "
                "legal; --host nemo builds this model, where NeMo 2 is installed"
            )
    return {"rope_scaling": True, "rope_scaling_factor": fields.pop("scale_factor")}


def fields_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """`named_fields` with the functions themselves, and with a spec of each layer for a model that has both mixtures
    and dense layers. Loads Megatron."""
    fields = named_fields(config)
    if name := fields.get("activation_func"):
        fields["activation_func"] = pkgutil.resolve_name(name)
    architecture = family_of(config).architecture(config)
    if architecture.num_moe_experts and architecture.dense_layers:
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

        fields["transformer_layer_spec"] = functools.partial(get_gpt_decoder_block_spec, use_transformer_engine=True)
    return fields


def overwrite(provider: Any, fields: Mapping[str, Any]) -> None:
    """Sets the fields of a provider. Raises InputError for one that this version of Bridge does not have."""
    for name, value in fields.items():
        if not hasattr(provider, name):
            raise InputError(f"Megatron-Bridge's {type(provider).__name__} has no '{name}'; give --host nemo")
        setattr(provider, name, value)


def plain_provider(fields: Mapping[str, Any]) -> Any:
    """Bridge's general provider, for a family of Llama's kind that Bridge has no class for."""
    import torch
    from megatron.bridge.models.gpt_provider import GPTModelProvider

    sizes = {name: fields[name] for name in ("num_layers", "hidden_size", "num_attention_heads")}
    return GPTModelProvider(**sizes, **OF_LLAMA, activation_func=torch.nn.functional.silu)
