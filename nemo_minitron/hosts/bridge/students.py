"""Writes a student as a checkpoint of Megatron-Bridge, from a user's job or from the prune stage."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.artifacts.files import atomic_folder
from nemo_minitron.families import family_of
from nemo_minitron.hosts.bridge.load import load_training
from nemo_minitron.hosts.bridge.models import DTYPES, build_model, say_vocabulary
from nemo_minitron.hosts.scoring import student_layout
from nemo_minitron.megatron.live import LiveSource, fill
from nemo_minitron.sources.bridge_config import config_of_model
from nemo_minitron.sources.open import open_source


def save_chunks(chunks: list[Any], folder: Path, vocab_size: int, tokenizer: str | Path | None = None) -> None:
    """Writes filled chunks as the checkpoint `folder/iter_0000000`, with a copy of the tokenizer. Collective.

    The padding of the vocabulary belongs to this layout; whoever loads the checkpoint pads for his own.
    """
    load_training()
    from megatron.bridge.training.model_load_save import save_megatron_model

    say_vocabulary(chunks[0].config, vocab_size)
    save_megatron_model(chunks, folder, hf_tokenizer_path=tokenizer)


def save_student(
    live: list[Any], plan: PrunePlan, path: Path, tokenizer: str | None, teacher: str | None = None
) -> None:
    """Writes the plan's student to `path`, in the layout of the running job. Collective.

    Its weights are read from `teacher`, or from the live model without one. An older checkpoint at `path` is replaced
    only when the new one is complete. Raises InputError if the teacher cannot be read or does not fit the plan.
    """
    opened = open_source(teacher) if teacher else None
    source = opened or LiveSource(live, plan.source)
    config = opened.config if opened else config_of_model(_fields(live[0].config))
    config = family_of(config).config(plan.target, config, plan.keep.get("layers"))
    precision = next(name for name, dtype in DTYPES.items() if dtype == live[0].config.params_dtype)
    chunks = build_model(config, precision=precision, layout=student_layout(live[0], plan.target))
    fill(chunks, source, plan)
    rank_zero = torch.distributed.get_rank() == 0
    with atomic_folder(path) if rank_zero else contextlib.nullcontext() as partial:
        place = [str(partial)]
        torch.distributed.broadcast_object_list(place, 0)  # only rank 0 knows the name of the temporary folder
        save_chunks(chunks, Path(place[0]), plan.target.vocab_size, tokenizer)
        torch.distributed.barrier()
    torch.distributed.barrier()


def _fields(config: Any) -> dict[str, Any]:
    """The fields of a live provider in the form in which a run_config.yaml has them; a function is given by its dotted
    name."""
    fields: dict[str, Any] = {"_target_": f"{type(config).__module__}.{type(config).__qualname__}"}
    for name, value in vars(config).items():
        if callable(value) and hasattr(value, "__module__"):
            value = f"{value.__module__}.{getattr(value, '__qualname__', type(value).__qualname__)}"
        fields[name] = value
    return fields
