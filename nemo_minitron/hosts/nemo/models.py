"""Builds NeMo's own model of a family, in a layout."""

from __future__ import annotations

import functools
import pkgutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

import nemo_minitron.backend as backend
from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import Compensation, PrunePlan
from nemo_minitron.backend.precision import apply
from nemo_minitron.families import family_of
from nemo_minitron.megatron.groups import model_sizes, start
from nemo_minitron.megatron.load import load
from nemo_minitron.precisions import weights_in
from nemo_minitron.settings.fp8 import check_fp8
from nemo_minitron.settings.layout import Layout
from nemo_minitron.sources.mapping import padded_vocab
from nemo_minitron.sources.open import open_source

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def nemo_config(
    config: Mapping[str, Any], *, precision: str = "fp32", layout: Layout | None = None, training: bool = False
) -> Any:
    """NeMo's config object for a Hugging Face config, of the class of its family.

    NeMo saves the arguments with which the config was constructed: the true vocabulary and Transformer Engine's
    defaults. The padded vocabulary, the sizes of the parallel groups and FP8 belong to this run alone; they are set
    afterwards, so they are never saved. `training`: see `backend.precision.apply`.

    Raises InputError for a family or a precision that NeMo's class does not have, and for a layout that does not fit
    the model.
    """
    backend.setup()
    from nemo.collections import llm

    weights = weights_in(precision)
    layout = layout or Layout()
    architecture = family_of(config).architecture(config)
    layout.check(architecture)
    check_fp8(architecture, layout, precision)
    name, fields = family_of(config).nemo_config(config)
    # `llm` does not export all config classes, but the module of the family's model class has its own.
    home = sys.modules[getattr(llm, family_of(config).nemo_model).__module__]
    if "activation_func" in fields:
        fields["activation_func"] = pkgutil.resolve_name(fields["activation_func"])
    fields |= _layer_spec(architecture)
    made = _recording(getattr(home, name))
    result = made(**fields, bf16=weights == "bf16", fp16=False, params_dtype=DTYPES[weights])
    apply(result, precision, training=training)
    result.vocab_size = padded_vocab(fields["vocab_size"], layout.tp)
    return result


def _recording(kind: type) -> type:
    """NeMo's class of configs, which records what each of its configs is constructed with.

    NeMo wraps a class when its first object is made, and takes a class that is derived from a wrapped one for wrapped:
    a Qwen3Config behind a Qwen2Config had no record.
    """
    if "__wrapped_init__" not in vars(kind):
        kind.__wrapped_init__ = False  # type: ignore[attr-defined]
    return kind


def _layer_spec(architecture: Architecture) -> dict[str, Any]:
    """NeMo's field for a model of which some layers are mixtures of experts and some dense.

    NeMo's default spec reads no `moe_layer_freq`: it makes a mixture of every layer."""
    if not architecture.num_moe_experts or not architecture.dense_layers:
        return {}
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    return {"transformer_layer_spec": functools.partial(get_gpt_decoder_block_spec, use_transformer_engine=True)}


def nemo_model(config: Mapping[str, Any], *, tokenizer: Any = None, **options: Any) -> Any:
    """NeMo's LightningModule for a Hugging Face config. NeMo's strategy builds its Megatron model later. The options
    are those of `nemo_config`, and `optim`, NeMo's optimizer module."""
    optim = options.pop("optim", None)
    model_config = nemo_config(config, **options)
    from nemo.collections import llm

    return getattr(llm, family_of(config).nemo_model)(model_config, tokenizer=tokenizer, optim=optim)


def build(config: Any, layout: Layout) -> list[Any]:
    """This rank's GPTModel chunks for a NeMo config: one for each virtual stage, with weights that are not initialised.

    The parameters are in `params_dtype`, even if an FP8 run of NeMo's would keep them in FP8, because they are filled
    piece by piece. Megatron's parallel groups must exist.
    """
    for name, size in model_sizes(layout).items():
        setattr(config, name, size)
    config.microbatch_group_size_per_vp_stage = layout.pp
    config.pipeline_dtype = config.params_dtype
    config.perform_initialization = config.fp8_param = False
    chunks = []
    for stage in range(layout.vp):
        first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage)
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage)
        chunk = config.configure_model(None, pre_process=first, post_process=last, vp_stage=stage)
        chunks.append(chunk.to(device=torch.cuda.current_device(), dtype=config.params_dtype))
    return chunks


def build_model(
    config: Mapping[str, Any], *, precision: str = "fp32", layout: Layout | None = None, training: bool = False
) -> list[Any]:
    """This rank's chunks for a Hugging Face config, without weights. Collective.

    If Megatron's parallel groups do not exist, those of the layout are started (one process by default). Options and
    errors are those of `nemo_config`.
    """
    layout = layout or Layout()
    model_config = nemo_config(config, precision=precision, layout=layout, training=training)
    start(layout)
    return build(model_config, layout)


def load_model(
    source: str | Path,
    plan: PrunePlan | str | Path | None = None,
    *,
    compensation: Compensation | None = None,
    precision: str = "fp32",
    layout: Layout | None = None,
    sp: bool = False,
) -> list[Any]:
    """A live Megatron model with its weights: this rank's chunks, one for each virtual stage. Collective.

    `source`: a Hugging Face folder, a hub id or a NeMo checkpoint. With a `plan` the model is the plan's student. Its
    tensors are read from the teacher, except those that `compensation` has. If Megatron's parallel groups do not exist,
    those of `layout` are started (one process by default); if they do, `sp` says whether the model runs sequence
    parallelism.

    Raises InputError if the source, the plan or the compensation cannot be read, or if they do not belong together.
    """
    backend.setup()
    plan = PrunePlan.load(plan) if isinstance(plan, (str, Path)) else plan
    options: dict[str, Any] = {"compensation": compensation, "precision": precision, "layout": layout, "sp": sp}
    return load(open_source(source), plan, build=build_model, **options)
