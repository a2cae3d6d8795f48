"""What a job puts in place of a plan's slices."""

from __future__ import annotations

import dataclasses

from nemo_minitron.errors import InputError
from nemo_minitron.pruning.compensation import RIDGE, SIGNS


@dataclasses.dataclass(frozen=True)
class Cutting:
    """`compensate`: matrices behind cut neurons and heads are solved anew from the calibration's activations, damped
    by `ridge`; `fold_norms` and `head_residual` ("paper", "laco" or none) as in `pruning/compensation.py`.

    Raises InputError for a ridge that is not above 0 and an unknown residual.
    """

    compensate: bool = False
    ridge: float = RIDGE
    fold_norms: bool = False
    head_residual: str = ""

    def __post_init__(self) -> None:
        if not self.ridge > 0:
            raise InputError(f"ridge is {self.ridge}; it must be above 0, for example {RIDGE}")
        if self.head_residual and self.head_residual not in SIGNS:
            raise InputError(f"head_residual '{self.head_residual}' is unknown; legal are {' and '.join(SIGNS)}")
