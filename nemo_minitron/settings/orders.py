"""What the processes of a stage are told: one order for each stage, written by a command and read by a worker."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from nemo_minitron.artifacts.files import read_json
from nemo_minitron.artifacts.typed import typed
from nemo_minitron.errors import InputError, nearest
from nemo_minitron.schema import settled
from nemo_minitron.settings.calibration import Calibration
from nemo_minitron.settings.finetuning import Finetuning
from nemo_minitron.settings.layout import Layout
from nemo_minitron.settings.recipe import Distillation


class Order:
    """What the launcher reads of an order. Its settings are final: their numbers are plain."""

    stage: ClassVar[str]
    out: Path
    layout: Layout

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            if dataclasses.is_dataclass(value := getattr(self, field.name)):
                object.__setattr__(self, field.name, settled(value))

    @property
    def processes(self) -> int:
        """Processes to start."""
        return self.layout.processes

    @property
    def place(self) -> Path:
        """Where the stage writes; the message of a failure names it."""
        return self.out


@dataclasses.dataclass(frozen=True)
class EstimateOrder(Order):
    """Score the units of a model. `data`: a .bin/.idx prefix. `work`: a folder from which a killed run resumes."""

    stage: ClassVar[str] = "estimate"
    model: Path
    data: Path
    work: Path
    calibration: Calibration
    layout: Layout

    @property
    def place(self) -> Path:
        return self.work


@dataclasses.dataclass(frozen=True)
class PruneOrder(Order):
    """Cut a checkpoint, in one process. `compensation`: a file of matrices that replace slices of the teacher."""

    stage: ClassVar[str] = "prune"
    model: Path
    plan: Path
    out: Path
    compensation: Path | None = None

    @property
    def processes(self) -> int:
        return 1


@dataclasses.dataclass(frozen=True)
class CompensateOrder(Order):
    """Re-fit the matrices that lose inputs to a cut. `plans`: the file of each plan -> the file of its Compensation.
    `memory`: bytes of Gram matrices on a rank. `calibration` says which rows are read. `reconstruct`: passes in which
    cut sub-blocks are then fitted as a whole, by steps of `reconstruct_batch` rows. `fill_gaps`: the matrices in front
    of dropped layers learn to write what these wrote."""

    stage: ClassVar[str] = "compensate"
    model: Path
    plans: Mapping[Path, Path]
    data: Path
    ridge: float | str
    memory: int
    calibration: Calibration
    layout: Layout
    reconstruct: int = 0
    reconstruct_batch: int = 1
    fill_gaps: bool = False

    @property
    def place(self) -> Path:
        return next(iter(self.plans.values()))


@dataclasses.dataclass(frozen=True)
class RotateOrder(Order):
    """Sum up the residual stream's second moments in `out`, a .npy file. `data`: a .bin/.idx prefix. `calibration` says
    which rows are read."""

    stage: ClassVar[str] = "rotate"
    model: Path
    data: Path
    out: Path
    calibration: Calibration
    layout: Layout


@dataclasses.dataclass(frozen=True)
class CacheOrder(Order):
    """Make the shards that the logit cache `out` lacks. Its `cache.json` must exist."""

    stage: ClassVar[str] = "cache"
    model: Path
    data: Path
    out: Path
    layout: Layout
    micro_batch_size: int


@dataclasses.dataclass(frozen=True)
class DistillOrder(Order):
    """Train a student in `out`. `teacher` is None if a cache takes its place. `train`, `validation`: .bin/.idx
    prefixes. `index`: a folder for the order of the samples. `stop`: the step after which this call ends; None means
    the last step. `plan`: the file of the plan that made the student. `common_vocabulary`: the tokens that both models
    begin with, if their vocabularies are not one."""

    stage: ClassVar[str] = "distill"
    student: Path
    teacher: Path | None
    train: Path
    validation: Path
    out: Path
    index: Path
    distillation: Distillation
    layout: Layout
    stop: int | None = None
    plan: Path | None = None
    common_vocabulary: int | None = None


@dataclasses.dataclass(frozen=True)
class FinetuneOrder(Order):
    """Tune a student on prompts and answers. `data`: a folder with `training.jsonl`."""

    stage: ClassVar[str] = "finetune"
    student: Path
    data: Path
    out: Path
    finetuning: Finetuning
    layout: Layout


ORDERS: dict[str, type[Order]] = {
    order.stage: order
    for order in (EstimateOrder, PruneOrder, CompensateOrder, RotateOrder, CacheOrder, DistillOrder, FinetuneOrder)
}


def read_order(stage: str, file: str | Path) -> Order:
    """The order of a stage from its JSON file. Raises InputError for an unknown stage, and as `typed`."""
    if stage not in ORDERS:
        raise InputError(f"there is no stage '{stage}'; {nearest(stage, ORDERS)}")
    return typed(ORDERS[stage], read_json(file, "the order"), f"the order '{file}'")
