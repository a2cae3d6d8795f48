"""Builds Megatron-Bridge's own model of a family, in a layout."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core import parallel_state

from nemo_minitron.backend.precision import apply
from nemo_minitron.errors import InputError, first_line
from nemo_minitron.families import family_of
from nemo_minitron.families.longrope import is_longrope
from nemo_minitron.hosts.bridge.fields import describe, plain_provider
from nemo_minitron.hosts.bridge.load import load_bridge
from nemo_minitron.megatron.groups import model_sizes, start
from nemo_minitron.megatron.live import keep_biases_wide
from nemo_minitron.precisions import weights_in
from nemo_minitron.settings.fp8 import check_fp8
from nemo_minitron.settings.layout import Layout
from nemo_minitron.sources.mapping import padded_vocab

# Fields of a Hugging Face config that Bridge does not read here: `describe` says them. Mistral's bridge fails on YaRN,
# and transformers 5 refuses a Llama whose hidden size is no multiple of its heads, which a student may be.
UNREAD = ("model_type", "rope_scaling", "hidden_size", "num_attention_heads", "quantization_config")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def provider_of(config: Mapping[str, Any], *, precision: str, layout: Layout, training: bool = False) -> Any:
    """Bridge's provider, its config object that builds a model, for a Hugging Face config.

    Raises InputError for a model or a precision that Bridge does not have, and for a layout that does not fit the
    model.
    """
    weights = weights_in(precision)
    architecture = family_of(config).architecture(config)
    # whatever Bridge has for it
    ours = architecture.hybrid_pattern or architecture.post_norms or architecture.kv_lora_rank
    bridge = None if ours else _bridge_of(config)
    layout.check(architecture)
    check_fp8(architecture, layout, precision)
    if bridge:
        provider = bridge.to_megatron_provider(load_weights=False)
    else:
        provider = plain_provider(architecture, is_longrope(config))
    describe(provider, config)
    for name, size in model_sizes(layout).items():
        setattr(provider, name, size)
    provider.bf16, provider.fp16, provider.params_dtype = weights == "bf16", False, DTYPES[weights]
    provider.pipeline_dtype, provider.autocast_dtype = DTYPES[weights], None
    provider.gradient_accumulation_fusion = False
    apply(provider, precision, training=training)
    provider.perform_initialization = provider.fp8_param = False
    provider.microbatch_group_size_per_vp_stage = layout.pp
    provider.vocab_size, provider.should_pad_vocab = padded_vocab(architecture.vocab_size, layout.tp), False
    provider.finalize()
    return provider


def say_vocabulary(config: Any, vocab_size: int) -> None:
    """Gives a config the vocabulary without padding, which Bridge then pads for a layout while it builds. What was
    built stays; whoever loads its checkpoint pads for his own layout.

    The loop's `setup` cannot be given it: of a vocabulary that is named, it takes the padding away.
    """
    config.vocab_size, config.should_pad_vocab, config.make_vocab_size_divisible_by = vocab_size, True, 1


def _bridge_of(config: Mapping[str, Any]) -> Any:
    """Bridge's AutoBridge for a Hugging Face config; None if Bridge has none for the family. Raises InputError if it
    cannot read the config."""
    logging.getLogger("megatron.bridge").setLevel(logging.ERROR)
    load_bridge()
    from megatron.bridge import AutoBridge
    from transformers import AutoConfig

    kind, name = str(config.get("model_type", "")), family_of(config).hf_class
    if name not in AutoBridge.list_supported_models():
        return None
    try:
        fields = {name: value for name, value in config.items() if name not in UNREAD}
        return AutoBridge.from_hf_config(AutoConfig.for_model(kind, **fields))
    except ValueError as error:
        raise InputError(f"Megatron-Bridge cannot read this {name}: {first_line(error)}") from error


def build_model(
    config: Mapping[str, Any], *, precision: str = "fp32", layout: Layout | None = None, training: bool = False
) -> list[Any]:
    """This rank's chunks for a Hugging Face config, without weights: one for each virtual stage. Collective.

    If Megatron's parallel groups do not exist, those of the layout are started (one process by default). Errors are
    those of `provider_of`.
    """
    layout = layout or Layout()
    provider = provider_of(config, precision=precision, layout=layout, training=training)
    say_vocabulary(provider, family_of(config).architecture(config).vocab_size)
    start(layout)
    chunks = []
    for stage in range(layout.vp):
        first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage)
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage)
        virtual = stage if layout.vp > 1 else None
        chunk = provider.provide(pre_process=first, post_process=last, vp_stage=virtual)
        chunks.append(chunk.to(device=torch.cuda.current_device(), dtype=provider.params_dtype))
    keep_biases_wide(chunks)
    return chunks
