"""Says what a model is to Megatron-Bridge's provider, by the family's own tables.

Bridge reads a Hugging Face config itself, but leaves some of it out without a word: windows, a mixture's dense layers,
linear scaling of positions, biases, Mistral's activation. So the tables decide here, as they do for NeMo.
"""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Mapping
from typing import Any

from nemo_minitron.architecture import Architecture
from nemo_minitron.errors import InputError
from nemo_minitron.families import family_of
from nemo_minitron.families.bridge import bridge_fields
from nemo_minitron.families.translate import ACTIVATIONS
from nemo_minitron.hosts.bridge.load import load_bridge

# Of a run or of NeMo's own files: `models.provider_of` sets what a provider has in their place.
_LEFT_OUT = ("make_vocab_size_divisible_by", "max_position_embeddings", "vocab_size")
OF_LLAMA = {  # as Bridge's class for Llama has it
    "apply_rope_fusion": True, "bias_activation_fusion": True, "bias_dropout_fusion": True,
    "masked_softmax_fusion": True, "persist_layer_norm": True, "attention_dropout": 0.0, "hidden_dropout": 0.0,
    "moe_router_load_balancing_type": "aux_loss",
}  # fmt: skip
_SQUARED_RELU = "megatron.core.activations.squared_relu"  # NeMo's is not installed beside Bridge


def plain_provider(architecture: Architecture, longrope: bool) -> Any:
    """Bridge's provider of any GPT model, for a family that Bridge has no class for, or of any hybrid; or ours of a
    Gemma, a DeepSeek or a model with longrope."""
    load_bridge()
    from megatron.bridge.models.gpt_provider import GPTModelProvider
    from megatron.bridge.models.hybrid.hybrid_provider import HybridModelProvider
    from megatron.core.transformer.enums import AttnBackend

    from nemo_minitron.hosts.bridge.deepseek import DeepseekProvider
    from nemo_minitron.hosts.bridge.gemma import GemmaProvider
    from nemo_minitron.hosts.bridge.longrope import LongRopeProvider

    sizes: dict[str, Any] = {n: getattr(architecture, n) for n in ("num_layers", "hidden_size", "num_attention_heads")}
    if architecture.hybrid_pattern:
        # Its default, flash, is not for fp32, and fails in a process whose other models leave the choice open.
        return HybridModelProvider(**sizes, attention_backend=AttnBackend.auto)
    provider: Any = GemmaProvider if architecture.post_norms else LongRopeProvider if longrope else GPTModelProvider
    provider = DeepseekProvider if architecture.kv_lora_rank else provider
    return provider(**sizes, **OF_LLAMA, hf_model_id=None)


def describe(provider: Any, config: Mapping[str, Any]) -> None:
    """Sets all that the family's tables say of the model on a provider that is not finalized.

    Raises InputError for what Bridge's provider or Megatron-core cannot represent.
    """
    family = family_of(config)
    fields = bridge_fields(family, config)
    activation = family.value(config, family.activation)
    named = family.own_activation or (_SQUARED_RELU if activation == "relu2" else ACTIVATIONS[activation])
    fields["activation_func"] = pkgutil.resolve_name(named)
    if fields.get("num_moe_experts"):
        fields |= _mixture(fields)
    for name, value in fields.items():
        if name in _LEFT_OUT:
            continue
        if not hasattr(provider, name):
            raise InputError(f"Megatron-Bridge's {type(provider).__name__} has no field '{name}'; give --host nemo")
        setattr(provider, name, value)


def _mixture(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The dispatcher that fits every layout, and a spec that reads `moe_layer_freq`; Bridge's default does not, that
    of a DeepSeek does."""
    dispatcher = {"moe_token_dispatcher_type": "alltoall"}
    if isinstance(fields.get("moe_layer_freq", 1), int) or fields.get("multi_latent_attention"):
        return dispatcher
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    return dispatcher | {
        "transformer_layer_spec": functools.partial(get_gpt_decoder_block_spec, use_transformer_engine=True)
    }
