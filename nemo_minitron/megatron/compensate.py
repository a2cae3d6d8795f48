"""The compensate stage: second moments of the uncut model's activations, and the matrices solved from them."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import Compensation, PrunePlan
from nemo_minitron.axes import AXES
from nemo_minitron.importance.gram import gram, whole
from nemo_minitron.megatron.load import Builder, load
from nemo_minitron.pruning.compensation import solvable, solve
from nemo_minitron.pruning.cut import check_plan
from nemo_minitron.settings.layout import Layout
from nemo_minitron.settings.orders import CompensateOrder
from nemo_minitron.sources.open import open_source
from nemo_minitron.sources.tensors import ModelSource


def compensate(order: CompensateOrder, host: Builder) -> None:
    """Leaves the Compensation of each plan of the order.

    The rows go through the model once for as many layers as `order.memory` holds the Gram matrices of, on a rank,
    however many plans there are. What a rank solves waits in files beside the Compensation, which rank 0 puts together:
    it alone holds all matrices of a plan, and of one plan at a time.
    """
    source, calibration = open_source(order.model), order.calibration
    cuts = [Cut(PrunePlan.load(plan), out) for plan, out in order.plans.items()]
    for cut in cuts:
        check_plan(cut.plan, source)
    chunks = load(source, build=host.build, precision=calibration.precision, layout=order.layout)
    if torch.distributed.get_rank() == 0:
        for cut in cuts:
            cut.begin()
    torch.distributed.barrier()
    batches, origins = own_batches(order), sorted({origin for cut in cuts for origin in cut.wanted})
    for layers in passes(source.architecture, origins, order.memory, order.layout):
        grams = gram(chunks, batches, layers, {origin.split(".")[2] for origin in origins})
        for origin in origins:
            found = whole(grams, origin)
            if found is not None:
                for cut in cuts:
                    cut.solve(source, origin, found, order.ridge)
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        rows = {name: getattr(calibration, name) for name in ("samples", "sequence_length", "seed", "precision")}
        for cut in cuts:
            cut.finish({"method": "least squares", "ridge": order.ridge, **rows})


class Cut:
    """A plan, and what is solved for it: a file a matrix in `parts`, then one Compensation in `out`."""

    def __init__(self, plan: PrunePlan, out: Path) -> None:
        self.plan, self.out = plan, out
        self.wanted = {origin: name for name, origin in solvable(plan)}
        self.parts = out.with_name(f"{out.name}.parts")

    def begin(self) -> None:
        shutil.rmtree(self.parts, ignore_errors=True)  # of a run that was killed
        self.parts.mkdir(parents=True)

    def solve(self, source: ModelSource, origin: str, gram: np.ndarray, ridge: float) -> None:
        if origin in self.wanted:
            name = self.wanted[origin]
            np.save(self.parts / name, solve(source, self.plan, name, gram, ridge))

    def finish(self, notes: dict[str, Any]) -> None:
        tensors = {name: np.load(self.parts / f"{name}.npy", mmap_mode="r") for name in self.wanted.values()}
        Compensation(self.plan.digest, tensors, notes).save(self.out)
        shutil.rmtree(self.parts)


def own_batches(order: CompensateOrder) -> list[torch.Tensor]:
    """This data-parallel rank's batches of the rows that the calibration's seed draws from the corpus."""
    from nemo_minitron.data import Tokens

    calibration = order.calibration
    rows = Tokens(order.data).windows(calibration.sequence_length, calibration.samples, calibration.seed)
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    return list(rows.split(calibration.batch_size))[rank::ranks]


def passes(source: Architecture, origins: Iterable[str], memory: int, layout: Layout) -> Iterator[list[int]]:
    """Source layers whose Gram matrices a rank holds at once, at least one."""
    layers = sorted({int(origin.split(".")[1]) for origin in origins})
    count = max(1, memory // bytes_of_layer(source, layout))
    for first in range(0, len(layers), count):
        yield layers[first : first + count]


def bytes_of_layer(a: Architecture, layout: Layout) -> int:
    """Of a layer's Gram matrices in fp64, on a rank of the layout: of the largest layer, with all its experts there."""
    dense = AXES["ffn"].length(a) ** 2 // layout.tp
    experts = AXES["experts"].length(a) // layout.ep * (a.moe_ffn_hidden_size or 0) ** 2 // layout.expert_tp
    return 8 * (max(dense, experts) + (a.num_attention_heads * a.head_dim) ** 2 // layout.tp)
