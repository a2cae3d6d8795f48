"""What a job puts in place of a plan's slices."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from nemo_minitron.architecture import Architecture
from nemo_minitron.errors import InputError
from nemo_minitron.pruning.defaults import RIDGE, SIGNS
from nemo_minitron.schema import setting

MEMORY = 4.0  # GB of Gram matrices on a rank
RESIDUAL = "Add pruned heads' differences to those that stay: paper, or laco for the other sign; needs --scores."


@dataclasses.dataclass(frozen=True)
class Cutting:
    """`compensate`: matrices behind cut neurons and heads are solved anew from the calibration's activations, damped
    by `ridge`; false leaves the papers' pure selection. `memory`: GB of Gram matrices on a rank, ffn^2 x 8 bytes a
    layer (and expert) over the ranks that share them; the calibration goes through the model once for as many layers
    as fit, one at least.
    `fold_norms` and `head_residual` ("paper", "laco" or none) as in `pruning/compensation.py`.

    Raises InputError for a ridge or a memory that is not above 0 and finite, an unknown residual, and a residual of
    heads that are compensated too.
    """

    compensate: bool = setting(True, "Fit the matrices behind cut neurons and heads anew; false: pure selection.")
    ridge: float = setting(RIDGE, "Damping, as a part of the mean squared input.", above_zero=True)
    memory: float = setting(MEMORY, "GB a rank for Gram matrices: layers at a time.", above_zero=True)
    fold_norms: bool = setting(False, "Scale norms for the hidden cut.")
    head_residual: str = setting("", RESIDUAL, legal=("", *SIGNS))

    def __post_init__(self) -> None:
        for name, value, usual in (("ridge", self.ridge, RIDGE), ("memory", self.memory, MEMORY)):
            if not (value > 0 and math.isfinite(value)):
                raise InputError(f"{name} is {value}; it must be above 0, for example {usual}, and finite")
        if self.head_residual and self.head_residual not in SIGNS:
            raise InputError(f"head_residual '{self.head_residual}' is unknown; legal are {' and '.join(SIGNS)}")
        if self.head_residual and self.compensate:
            raise InputError("head_residual changes the heads that compensate solves for; set cutting.compensate=false")

    def deciding(self) -> dict[str, Any]:
        """The values that decide the student's weights."""
        values = dataclasses.asdict(self)
        for name in ("memory",) if self.compensate else ("memory", "ridge"):
            del values[name]
        return values

    def check(self, source: Architecture, target: Architecture, searched: bool) -> None:
        """Raises InputError for what this cut leaves no room for; `searched`: its sizes are not known yet."""
        from nemo_minitron.pruning.compensation import check_fold, check_residual

        if self.head_residual and searched:
            raise InputError("head_residual needs sizes in keep, and a search tries shapes that keep all heads")
        if self.head_residual:
            check_residual(source, target, self.head_residual)
        if self.fold_norms and not searched:
            check_fold(source, target)
