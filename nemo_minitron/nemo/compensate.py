"""The compensate stage: second moments of the uncut model's activations, and the matrices solved from them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state

import nemo_minitron.backend as backend
from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import Compensation, PrunePlan
from nemo_minitron.importance.gram import gram, whole
from nemo_minitron.job.settings.layout import Layout
from nemo_minitron.pruning.compensation import solvable, solve
from nemo_minitron.pruning.cut import check_plan


def compensate(settings: dict[str, Any]) -> None:
    """`model`, `plan`, `data` (.bin/.idx prefix), `out`, `ridge`, `memory` (bytes), `layout`, and of the rows
    `samples`, `sequence_length`, `batch_size`, `precision`, `seed`.

    The rows go through the model once for as many layers as `memory` holds the Gram matrices of, on a rank. Leaves a
    Compensation in `out`.
    """
    backend.setup()
    from nemo_minitron.nemo.models import load_model
    from nemo_minitron.nemo.sources import open_source

    plan, source = PrunePlan.load(settings["plan"]), open_source(settings["model"])
    check_plan(plan, source)
    layout = Layout(**settings["layout"])
    chunks = load_model(settings["model"], precision=settings["precision"], layout=layout)
    batches, wanted = own_batches(settings), dict(solvable(plan))
    solved: dict[str, np.ndarray] = {}
    for layers in passes(plan, wanted, settings["memory"], layout.tp):
        grams = gram(chunks, batches, layers, {origin.split(".")[2] for origin in wanted.values()})
        for name, origin in wanted.items():
            found = whole(grams, origin)
            if found is not None and _speaks():
                solved[name] = solve(source, plan, name, found, settings["ridge"])
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    rank_zero = torch.distributed.get_rank() == 0
    torch.distributed.gather_object(solved, everyone if rank_zero else None)
    if rank_zero:
        tensors = {name: tensor for part in everyone for name, tensor in part.items()}
        rows = {name: settings[name] for name in ("samples", "sequence_length", "seed", "precision")}
        notes = {"method": "least squares", "ridge": settings["ridge"], **rows}
        Compensation(plan.digest, {name: tensors[name] for name in wanted}, notes).save(Path(settings["out"]))


def own_batches(settings: dict[str, Any]) -> list[torch.Tensor]:
    """This data-parallel rank's batches of the rows that `seed` draws from the corpus."""
    from nemo_minitron.nemo.data import Tokens

    rows = Tokens(settings["data"]).windows(settings["sequence_length"], settings["samples"], settings["seed"])
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    return list(rows.split(settings["batch_size"]))[rank::ranks]


def passes(plan: PrunePlan, wanted: dict[str, str], memory: int, tp: int) -> Iterator[list[int]]:
    """Source layers whose Gram matrices a rank holds at once, at least one."""
    layers = sorted({int(origin.split(".")[1]) for origin in wanted.values()})
    count = max(1, memory * tp // bytes_of_layer(plan.source))
    for first in range(0, len(layers), count):
        yield layers[first : first + count]


def bytes_of_layer(architecture: Architecture) -> int:
    """Of a layer's two Gram matrices in fp64."""
    return 8 * (architecture.ffn_hidden_size**2 + (architecture.num_attention_heads * architecture.head_dim) ** 2)


def _speaks() -> bool:
    """Of all ranks that hold a layer's Gram matrix, one solves."""
    copy = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    return copy == 0 and parallel_state.get_tensor_model_parallel_rank() == 0
