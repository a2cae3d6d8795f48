"""Building NeMo's own model of a family, in this process's layout."""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

import nemo_minitron.backend as backend
from nemo_minitron.artifacts import Compensation, PrunePlan
from nemo_minitron.backend.precision import apply
from nemo_minitron.families import family_of
from nemo_minitron.megatron.groups import start
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
    """NeMo's config object of the family of a Hugging Face config.

    NeMo serialises what the config was constructed with: the true vocabulary and Transformer Engine's
    defaults. What this layout needs on top (a padded vocabulary, the sizes of the parallel groups) and FP8 are set
    afterwards and never saved. `training`: see `backend.precision.apply`. Raises InputError for models or precisions
    that NeMo's class cannot be.
    """
    backend.setup()
    from nemo.collections import llm

    weights = weights_in(precision)
    layout = layout or Layout()
    architecture = family_of(config).architecture(config)
    layout.check(architecture)
    check_fp8(architecture, layout, precision)
    name, fields = family_of(config).nemo_config(config)
    home = sys.modules[getattr(llm, family_of(config).nemo_model).__module__]  # llm itself lacks some config classes
    if "activation_func" in fields:
        fields["activation_func"] = pkgutil.resolve_name(fields["activation_func"])
    result = getattr(home, name)(**fields, bf16=weights == "bf16", fp16=False, params_dtype=DTYPES[weights])
    apply(result, precision, training=training)
    result.vocab_size = padded_vocab(fields["vocab_size"], layout.tp)
    return result


def nemo_model(config: Mapping[str, Any], *, tokenizer: Any = None, **options: Any) -> Any:
    """NeMo's LightningModule of the family, not yet built; options as for `nemo_config`, and `optim`."""
    optim = options.pop("optim", None)
    built = nemo_config(config, **options)
    from nemo.collections import llm

    return getattr(llm, family_of(config).nemo_model)(built, tokenizer=tokenizer, optim=optim)


def build(config: Any, layout: Layout) -> list[Any]:
    """Megatron's GPTModel chunks of this rank for a NeMo config; frozen nothing, initialised at random.

    Parameters lie in `params_dtype`, also where an FP8 run of NeMo's would keep them in FP8: they are filled by pieces.
    """
    config.tensor_model_parallel_size = layout.tp
    config.pipeline_model_parallel_size = layout.pp
    config.virtual_pipeline_model_parallel_size = layout.vp if layout.vp > 1 else None
    config.context_parallel_size = layout.cp
    config.expert_model_parallel_size = layout.ep
    config.expert_tensor_parallel_size = layout.expert_tp
    config.num_layers_in_first_pipeline_stage = layout.first_stage or None
    config.num_layers_in_last_pipeline_stage = layout.last_stage or None
    config.sequence_parallel = layout.sp and layout.tp > 1
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
    """The chunks of this rank for a Hugging Face config, not filled yet; options and refusals as `nemo_config`.

    Without parallel groups it starts those of the layout (one process by default).
    """
    layout = layout or Layout()
    made = nemo_config(config, precision=precision, layout=layout, training=training)
    start(layout)
    return build(made, layout)


def load_model(
    source: str | Path,
    plan: PrunePlan | str | Path | None = None,
    *,
    compensation: Compensation | None = None,
    precision: str = "fp32",
    layout: Layout | None = None,
    sp: bool = False,
) -> list[Any]:
    """A live Megatron model: this rank's list of chunks (one without virtual stages), filled by reading.

    `source`: a Hugging Face folder, a hub id or a NeMo checkpoint. With a `plan` the model is the plan's
    student, read from its teacher but for the tensors of `compensation`. Without parallel groups it starts those of
    `layout` (one process by default). Raises InputError for a source, plan or compensation that is not legal.
    """
    backend.setup()
    plan = PrunePlan.load(plan) if isinstance(plan, (str, Path)) else plan
    options: dict[str, Any] = {"compensation": compensation, "precision": precision, "layout": layout, "sp": sp}
    return load(open_source(source), plan, build=build_model, **options)
