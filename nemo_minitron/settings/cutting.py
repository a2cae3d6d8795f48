"""What a student gets beyond plain slices of its teacher: re-fitted matrices, folded norms, scales behind dropped
layers, the residual of heads."""

from __future__ import annotations

import dataclasses
import math

from nemo_minitron.architecture import Architecture
from nemo_minitron.errors import InputError
from nemo_minitron.pruning.defaults import RIDGE, SIGNS
from nemo_minitron.schema import setting

MEMORY = 4.0  # GB (10^9 bytes) of Gram matrices on a rank
FOLD = "Scale RMSNorms by sqrt(all / kept) where hidden channels are cut."
GAPS = "Scale what is written to the residual stream behind dropped layers to the stream's length there."
RESIDUAL = (
    "Add the residual of pruned heads to the heads that stay: paper, or laco (the other sign). It needs --scores."
)


@dataclasses.dataclass(frozen=True)
class Cutting:
    """What the student gets beyond plain slices of its teacher.

    `compensate`: the matrices that lose inputs to a cut of neurons or heads are re-fitted, by least squares on the
    calibration's activations, damped by `ridge`; false leaves the papers' pure selection.
    `memory`: GB (10^9 bytes) of Gram matrices on a rank. A layer (and expert) takes ffn^2 x 8 bytes, divided among the
    ranks that share it. One pass of the calibration serves as many layers as fit, at least one.
    `fold_norms`: where hidden channels are cut, RMSNorms are scaled for the smaller number of channels. LayerNorms, for
    which no factor is exact, stay as they are.
    `scale_gaps`: where layers are dropped, what is written to the residual stream behind them is scaled to the length
    that the stream has there (`pruning/gaps.py`). A calibration that does not score the stream (another `method` than
    activation, or `axes` without it) leaves the slices as they are.
    `head_residual` ("paper", "laco" or none): see `pruning/compensation.py`.

    Raises InputError for a ridge or a memory that is not finite and above 0, an unknown residual, and a head residual
    together with `compensate`.
    """

    compensate: bool = setting(True, "Re-fit the matrices that lose inputs to the cut; false: pure selection.")
    ridge: float = setting(
        RIDGE, "Damping of the least squares, as a share of the mean squared input.", above_zero=True
    )
    memory: float = setting(
        MEMORY, "GB of Gram matrices on each rank; it limits how many layers one pass serves.", above_zero=True
    )
    fold_norms: bool = setting(True, FOLD)
    scale_gaps: bool = setting(True, GAPS)
    head_residual: str = setting("", RESIDUAL, legal=("", *SIGNS))

    def __post_init__(self) -> None:
        for name, value, usual in (("ridge", self.ridge, RIDGE), ("memory", self.memory, MEMORY)):
            if not (value > 0 and math.isfinite(value)):
                raise InputError(f"{name} is {value}; it must be above 0, for example {usual}, and finite")
        if self.head_residual and self.head_residual not in SIGNS:
            raise InputError(f"head_residual '{self.head_residual}' is unknown; legal are {' and '.join(SIGNS)}")
        if self.head_residual and self.compensate:
            raise InputError("head_residual changes the heads that compensate re-fits; set cutting.compensate=false")

    def deciding(self) -> dict[str, object]:
        """Name -> value of the settings that decide the student's weights."""
        values = dataclasses.asdict(self)
        for name in ("memory",) if self.compensate else ("memory", "ridge"):
            del values[name]
        return values

    def folds(self, source: Architecture, target: Architecture) -> bool:
        """Whether this cut's norms are scaled."""
        from nemo_minitron.pruning.compensation import can_fold

        return self.fold_norms and can_fold(source, target)

    def scales(self, source: Architecture, target: Architecture, stream: bool) -> bool:
        """Whether what this cut leaves behind dropped layers is scaled. `stream`: the calibration scores the stream."""
        return self.scale_gaps and stream and source.num_layers != target.num_layers

    def check(self, source: Architecture, target: Architecture, searched: bool) -> None:
        """Raises InputError for a setting that this cut cannot have. `searched`: a search will find the sizes."""
        from nemo_minitron.pruning.compensation import check_residual

        if self.head_residual and searched:
            raise InputError("head_residual needs sizes in keep; the shapes of a search keep all heads")
        if self.head_residual:
            check_residual(source, target, self.head_residual)
