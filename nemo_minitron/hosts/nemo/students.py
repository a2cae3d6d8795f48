"""Writes a student as a NeMo checkpoint of the teacher's own class, from a user's job or from the prune stage."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing

from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.artifacts.files import atomic_folder
from nemo_minitron.artifacts.temporary import apart
from nemo_minitron.families import family_of
from nemo_minitron.families.base import nemo_sizes
from nemo_minitron.hosts.nemo.data_module import nemo_tokenizer
from nemo_minitron.hosts.nemo.models import build, nemo_model
from nemo_minitron.hosts.nemo.trainer import chunks_of, leave_context, make_trainer
from nemo_minitron.hosts.scoring import student_layout
from nemo_minitron.megatron.live import LiveSource, fill
from nemo_minitron.megatron.prune import precision_of
from nemo_minitron.settings.layout import Layout
from nemo_minitron.sources.context import read_context, resize_context
from nemo_minitron.sources.mapping import padded_vocab
from nemo_minitron.sources.open import open_source

# Fields of the config that stay as the teacher has them.
KEPT = ("vocab_size", "share_embeddings_and_output_weights", "make_vocab_size_divisible_by")

# Fields with one value a layer, beside `moe_layer_freq`, which the sizes have.
PER_LAYER = ("no_rope_freq", "window_attn_skip_freq")


def save_student(trainer: Any, module: Any, plan: PrunePlan, path: Path, teacher: str | None = None) -> None:
    """Writes the plan's student to `path` (weights/ and context/), in the layout of the running job. Collective.

    Its weights are read from `teacher`, or from the live model without one. An older checkpoint at `path` is replaced
    only when the new one is complete. Raises InputError if the teacher cannot be read or does not fit the plan.
    """
    live = chunks_of(trainer)
    layout = student_layout(live[0], plan.target)
    student = student_module(module, plan, layout.tp)
    chunks = build(student.config, layout)
    fill(chunks, open_source(teacher) if teacher else LiveSource(live, plan.source), plan)
    rank_zero = torch.distributed.get_rank() == 0
    with atomic_folder(path) if rank_zero else contextlib.nullcontext() as partial:
        if partial is not None:
            (partial / "weights").mkdir()
        place = [str(partial)]
        torch.distributed.broadcast_object_list(place, 0)  # only rank 0 knows the name of the temporary folder
        state = {"state_dict": {}, "sharded_state_dict": sharded_state(chunks)}
        dist_checkpointing.save(state, str(Path(place[0], "weights")))
        torch.distributed.barrier()
        if partial is not None:
            _write_context(trainer, student, partial / "context")
    torch.distributed.barrier()


def save_like(teacher: Path, chunks: list[Any], folder: Path, plan: PrunePlan) -> None:
    """Writes a student's chunks to `folder` (weights/ and context/). Collective.

    The context is a copy of the teacher's with the plan's sizes. It is changed as data: the teacher's class need not be
    built.
    """
    _save_weights(chunks, folder)
    sizes = {name: size for name, size in nemo_sizes(plan.target).items() if name not in KEPT}
    sizes |= _layer_lists(read_context(teacher / "context").config, plan)
    resize_context(teacher / "context", folder / "context", sizes)


def save_new(teacher: Path, chunks: list[Any], folder: Path, plan: PrunePlan) -> None:
    """As `save_like`, for a teacher that is a checkpoint of another host: the context is a new one, of NeMo's class for
    the teacher's family, with the teacher's tokenizer. Collective."""
    from nemo.lightning.io.pl import TrainerContext

    source = open_source(teacher)
    config = family_of(source.config).config(plan.target, source.config, plan.keep.get("layers"))
    precision = precision_of(source)
    _save_weights(chunks, folder)
    with apart() as scratch:  # NeMo copies the tokenizer to the context
        model = nemo_model(config, tokenizer=nemo_tokenizer(source.folder, scratch), precision=precision)
        trainer = make_trainer(Layout(), precision)
        TrainerContext(model=model, trainer=trainer, extra={}).io_dump(folder / "context", yaml_attrs=["model"])


def _save_weights(chunks: list[Any], folder: Path) -> None:
    (folder / "weights").mkdir()
    state = {"state_dict": {}, "sharded_state_dict": sharded_state(chunks)}
    dist_checkpointing.save(state, str(folder / "weights"))


def student_module(module: Any, plan: PrunePlan, tp: int) -> Any:
    """NeMo's LightningModule of the teacher's class with the plan's sizes, made from the arguments that NeMo recorded.

    The record does not have what the running job set later on the teacher's config. The padded vocabulary is set again
    here; `tp` is the tensor-parallel size.
    """
    import copy

    import fiddle as fdl

    recorded = copy.deepcopy(module.__io__)
    for name, value in nemo_sizes(plan.target).items():
        if name == "vocab_size" or name not in KEPT:
            setattr(recorded.config, name, value)
    for name, values in _layer_lists({name: getattr(module.config, name, None) for name in PER_LAYER}, plan).items():
        setattr(recorded.config, name, values)
    student = fdl.build(recorded)
    student.config.vocab_size = padded_vocab(plan.target.vocab_size, tp)
    return student


def _layer_lists(fields: Mapping[str, Any], plan: PrunePlan) -> dict[str, list[Any]]:
    """The fields of NeMo's config that have one value a layer, for the layers that stay."""
    kept = plan.keep.get("layers")
    if kept is None:
        return {}
    lists = {name: fields.get(name) for name in PER_LAYER}
    return {name: [values[layer] for layer in kept] for name, values in lists.items() if isinstance(values, list)}


def sharded_state(chunks: list[Any]) -> dict[str, Any]:
    """The chunks' sharded state under NeMo's names: with the prefix `module.`, one entry for each virtual stage."""
    metadata = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    states = [chunk.sharded_state_dict(prefix="module.", metadata=metadata) for chunk in chunks]
    return states[0] if len(states) == 1 else {f"model_{i}": state for i, state in enumerate(states)}


def _write_context(trainer: Any, student: Any, folder: Path) -> None:
    from nemo.lightning.io.pl import TrainerContext

    leave_context(trainer)
    TrainerContext(model=student, trainer=trainer, extra={}).io_dump(folder, yaml_attrs=["model"])
