"""The compensate stage: it sums the Gram matrices of the uncut model's activations and re-fits matrices with them. Then
it may fit cut sub-blocks as a whole.

Shapes (docs/shapes.md): D input channels of a matrix.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from megatron.core import parallel_state

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import Compensation, PrunePlan
from nemo_minitron.artifacts.blocks import Gap
from nemo_minitron.artifacts.json_types import JsonObject
from nemo_minitron.backend.collectives import gather_objects
from nemo_minitron.costs import gram_bytes
from nemo_minitron.importance.gap_sums import gap_sums
from nemo_minitron.importance.gram import gram, whole
from nemo_minitron.megatron.cuts import Cut
from nemo_minitron.megatron.live import LiveSource
from nemo_minitron.megatron.load import Builder, load
from nemo_minitron.megatron.progress import Report, counted
from nemo_minitron.megatron.reconstruct import reconstruct
from nemo_minitron.pruning.cut import check_plan
from nemo_minitron.pruning.defaults import AUTO
from nemo_minitron.pruning.gaps import last_matrix
from nemo_minitron.pruning.reconstruction import (
    SHARES,
    cut_blocks,
    cut_within,
    fitted_blocks,
    fitted_matrices,
    of_student,
)
from nemo_minitron.settings.layout import Layout
from nemo_minitron.settings.orders import CompensateOrder, RotateOrder
from nemo_minitron.settings.reconstruction import SOLVED, START
from nemo_minitron.sources.open import open_source
from nemo_minitron.sources.tensors import ModelSource
from nemo_minitron.sources.tensors import whole as everything

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule


def compensate(order: CompensateOrder, host: Builder) -> None:
    """Writes the Compensation of each plan of the order. Collective.

    One pass of the rows through the model serves all plans. It takes as many layers as have room for their Gram
    matrices in `order.memory` bytes on a rank; the rows pass again for the next layers. Each rank writes the matrices
    that it re-fits to files beside the Compensation. Rank 0 joins the files, one plan at a time, so that no rank holds
    the matrices of several plans.

    Under `order.fill_gaps` another pass follows for the matrices in front of dropped layers (`pruning/gaps.py`). Under
    `order.reconstruct` the cut sub-blocks of each plan are then fitted as a whole, one plan after another.

    Raises InputError if the model, the text or a plan cannot be read, or if they do not belong together.
    """
    source, calibration = open_source(order.model), order.calibration
    wanted = [Cut(PrunePlan.load(plan), out, order.fill_gaps) for plan, out in order.plans.items()]
    for cut in wanted:
        check_plan(cut.plan, source)
    fits = [Fit(cut) for cut in wanted if order.reconstruct and cut_blocks(cut.plan.source, cut.plan.target)]
    fitted = [fit.cut for fit in fits]
    cuts = [*(cut for cut in wanted if cut not in fitted), *(part for fit in fits for part in (fit.solved, fit.start))]
    chunks = load(source, build=host.build, precision=calibration.precision, layout=order.layout)
    if torch.distributed.get_rank() == 0:
        for cut in cuts:
            cut.begin()
    torch.distributed.barrier()
    batches, origins = rank_batches(order), sorted({origin for cut in cuts for origin in cut.wanted})
    copies = 2 if order.ridge == AUTO else 1
    groups = list(passes(source.architecture, origins, order.memory // copies, order.layout))
    report = Report("compensation: row", scale=calibration.sequence_length)
    for group, layers in enumerate(groups):
        with counted(chunks[0], reporting(order, report, group, len(groups))):
            kinds = {origin.split(".")[2] for origin in origins}
            grams = gram(chunks, batches, layers, kinds, halves=order.ridge == AUTO)
        for origin in origins:
            found = whole(grams, origin)
            if found is not None:  # one rank of those that hold the tensor has its Gram matrix and re-fits it
                for cut in cuts:
                    cut.solve(source, origin, found, order.ridge)
    growth = fill(order, source, chunks, batches, cuts)
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        rows = {name: getattr(calibration, name) for name in ("samples", "sequence_length", "seed", "precision")}
        for cut in cuts:
            cut.finish(source, {"method": "least squares", "ridge": order.ridge, **rows}, growth)
    torch.distributed.barrier()
    for fit in fits:
        fit.run(order, host, source, chunks)


def fill(
    order: CompensateOrder, source: ModelSource, chunks: list[MegatronModule], batches: list[torch.Tensor],
    cuts: list[Cut],
) -> dict[Gap, float]:  # fmt: skip
    """Leaves the changes of the matrices in front of dropped layers among each cut's parts. The logarithm of how much
    the stream grows over each gap. Collective."""
    a = source.architecture
    growth: dict[Gap, float] = {}
    wanted = {gap: last_matrix(a, gap) for cut in cuts for gap in cut.gaps}
    some = sorted(wanted)
    widths = [a.shapes()[f"layers.{gap.first - 1}.{local}"][1] for gap, local in wanted.items() if local]
    one = 8 * max(widths, default=1) * (max(widths, default=1) + 2 * a.hidden_size) // order.layout.tp
    count = max(1, order.memory // one)
    groups = [some[first : first + count] for first in range(0, len(some), count)]
    report = Report("gaps: row", scale=order.calibration.sequence_length)
    for number, group in enumerate(groups):
        with counted(chunks[0], reporting(order, report, number, len(groups))):
            sums, grown = gap_sums(chunks, batches, {gap: wanted[gap] for gap in group})
        growth |= grown
        for gap, rows in sums.items():
            found = whole({(name := f"layers.{gap.first - 1}.{wanted[gap]}"): rows}, name)
            if found is not None:
                for cut in cuts:
                    cut.fill(gap, found, grown[gap])
    return growth


def reporting(
    order: CompensateOrder | RotateOrder, report: Report, group: int = 0, groups: int = 1
) -> Callable[[int], None]:
    """A function of the forward passes in which one of the groups of layers is gathered. Rank 0 reports their rows."""
    if torch.distributed.get_rank():
        return lambda passes: None
    samples, per_pass = order.calibration.samples, order.calibration.batch_size * order.layout.dp
    return lambda passes: report(samples * group + min(samples, passes * per_pass), samples * groups)


class Fit:
    """The cut sub-blocks of a plan, fitted as a whole from `start`, the least squares of the cut within them alone.

    `solved`: the plan's own least squares, of which stays what is not fitted: attention with latents."""

    def __init__(self, cut: Cut) -> None:
        self.cut = cut  # whose file appears when all is done
        self.solved = Cut(cut.plan, cut.out.with_name(f"{cut.out.name}{SOLVED}"), fill_gaps=bool(cut.gaps))
        self.start = Cut(cut_within(cut.plan), cut.out.with_name(f"{cut.out.name}{START}"))

    def run(self, order: CompensateOrder, host: Builder, source: ModelSource, teacher: list[MegatronModule]) -> None:
        """Puts the fitted matrices into the plan's Compensation. Collective."""
        plan, alone, first = self.cut.plan, self.start.plan, torch.distributed.get_rank() == 0
        solved = Compensation.load(self.start.out)
        student = load(source, alone, build=host.build, compensation=solved, precision="fp32", layout=order.layout)
        report = Report("reconstruction: pass") if first else lambda done, total: None
        found = reconstruct(order, teacher, student, rows_of(order), fitted_blocks(plan, self.cut.filled), report)
        errors = {k: v for each in gather_objects(found, torch.distributed.group.WORLD) for k, v in each.items()}
        live = LiveSource(student, alone.target)
        if first:
            self.cut.begin()
        for name, origin, _ in fitted_matrices(plan, self.cut.filled):
            raw = live.read(origin, everything(alone.target.shapes()[origin]))
            if first:
                np.save(self.cut.parts / name, of_student(plan, name, raw.view(np.float32)))
        torch.distributed.barrier()
        if first:
            self._join(order, errors)

    def _join(self, order: CompensateOrder, errors: Mapping[str, tuple[float, float]]) -> None:
        """`errors`: `LAYER NAME` of a sub-block -> its error on held-out rows, before and after."""
        solved, parts = Compensation.load(self.solved.out), self.cut.parts
        fitted = {
            name: np.load(parts / f"{name}.npy", mmap_mode="r")
            for name, *_ in fitted_matrices(self.cut.plan, self.cut.filled)
        }
        in_order = sorted(errors, key=lambda name: (int(name.split()[0]), name))
        kept = {name: min(errors[name][1] / errors[name][0], 1.0) if errors[name][0] else 1.0 for name in in_order}
        notes: JsonObject = {
            "reconstruct": order.reconstruct, "reconstruct_batch": order.reconstruct_batch,
            SHARES: {n: round(x, 4) for n, x in kept.items()},
        }  # fmt: skip
        both = {name: solved.tensors[name] for name in solved.tensors if name not in fitted} | fitted
        dataclasses.replace(solved, tensors=both, notes=solved.notes | notes).save(self.cut.out)
        shutil.rmtree(parts)
        for part in (self.solved, self.start):
            part.out.unlink()


def rows_of(order: CompensateOrder | RotateOrder) -> torch.Tensor:
    """All rows that the calibration's seed draws from the corpus, int64 [samples, sequence_length]."""
    from nemo_minitron.data import Tokens

    calibration = order.calibration
    return Tokens(order.data).windows(calibration.sequence_length, calibration.samples, calibration.seed)


def rank_batches(order: CompensateOrder | RotateOrder) -> list[torch.Tensor]:
    """This data-parallel rank's share of the rows that the calibration's seed draws from the corpus.

    Each batch is int64 [batch_size, sequence_length]; the last one may be smaller.
    """
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    return list(rows_of(order).split(order.calibration.batch_size))[rank::ranks]


def passes(source: Architecture, origins: Iterable[str], memory: int, layout: Layout) -> Iterator[list[int]]:
    """Groups of the teacher's layers: a rank has room for the Gram matrices of one group. A group has at least one
    layer. `memory`: bytes."""
    layers = sorted({int(origin.split(".")[1]) for origin in origins})
    count = max(1, memory // gram_bytes(source, layout))
    for first in range(0, len(layers), count):
        yield layers[first : first + count]
