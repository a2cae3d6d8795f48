"""Builds Megatron-Bridge's own model of a family, in a layout."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core import parallel_state

from nemo_minitron.backend.precision import apply
from nemo_minitron.families import family_of
from nemo_minitron.hosts.bridge.fields import fields_of, overwrite, plain_provider
from nemo_minitron.hosts.bridge.load import load_bridge
from nemo_minitron.megatron.groups import model_sizes, start
from nemo_minitron.precisions import weights_in
from nemo_minitron.settings.fp8 import check_fp8
from nemo_minitron.settings.layout import Layout
from nemo_minitron.sources.mapping import padded_vocab

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def provider_of(config: Mapping[str, Any], *, precision: str, layout: Layout, training: bool = False) -> Any:
    """Bridge's provider, its config object that builds a model, for a Hugging Face config.

    Raises InputError for a model or a precision that Bridge does not have, and for a layout that does not fit the
    model.
    """
    load_bridge()  # before anything imports Megatron
    fields = fields_of(config)
    provider = _provider(config, fields)
    weights = weights_in(precision)
    architecture = family_of(config).architecture(config)
    layout.check(architecture)
    check_fp8(architecture, layout, precision)
    overwrite(provider, fields)
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


def _provider(config: Mapping[str, Any], fields: Mapping[str, Any]) -> Any:
    """What Bridge makes of a Hugging Face config: the provider of its own class for the family, or its general one."""
    logging.getLogger("megatron.bridge").setLevel(logging.ERROR)
    from megatron.bridge import AutoBridge
    from transformers import AutoConfig

    kind = str(config.get("model_type", ""))
    own = {name: value for name, value in config.items() if name != "model_type"}
    hf = AutoConfig.for_model(kind, **own | {"architectures": [family_of(config).hf_class]})
    try:
        bridge = AutoBridge.from_hf_config(hf)
    except ValueError:  # it has no class for the family
        return plain_provider(fields)
    return bridge.to_megatron_provider(load_weights=False)


def build_model(
    config: Mapping[str, Any], *, precision: str = "fp32", layout: Layout | None = None, training: bool = False
) -> list[Any]:
    """This rank's chunks for a Hugging Face config, without weights: one for each virtual stage. Collective.

    If Megatron's parallel groups do not exist, those of the layout are started (one process by default). Errors are
    those of `provider_of`.
    """
    layout = layout or Layout()
    provider = provider_of(config, precision=precision, layout=layout, training=training)
    start(layout)
    chunks = []
    for stage in range(layout.vp):
        first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage)
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage)
        virtual = stage if layout.vp > 1 else None
        chunk = provider.provide(pre_process=first, post_process=last, vp_stage=virtual)
        chunks.append(chunk.to(device=torch.cuda.current_device(), dtype=provider.params_dtype))
    return chunks
