"""How many rows of a calibration a reconstruction learns from, and how many it holds out."""

from __future__ import annotations

from nemo_minitron.errors import InputError
from nemo_minitron.schema import asked_for

SOLVED, START = ".solved", ".start"  # behind the name of a Compensation: the files that a reconstruction begins with
HELD_OUT = 16  # one of so many rows is held out, and at least one step's


def held_out(rows: int, batch: int) -> int:
    """The number of rows that are held out, in whole steps of `batch` rows."""
    return max(1, rows // HELD_OUT // batch) * batch


def rows_of_step(rows: int, batch: int, ranks: int) -> int:
    """The rows of a step: `batch`, or one a rank if nobody asked for `batch` and it does not fit.

    Raises InputError if `ranks` data-parallel ranks cannot share a step's rows, or if no step is left to learn from.
    """
    if not asked_for(batch) and batch % ranks:
        batch = ranks
    if batch % ranks:
        near = max(1, round(batch / ranks)) * ranks
        raise InputError(
            f"reconstruct_batch={batch} rows do not divide among {ranks} data-parallel ranks; the nearest legal is "
            f"{near}"
        )
    if rows < held_out(rows, batch) + batch:
        raise InputError(
            f"reconstruct needs a step to learn from and one held out; {rows} calibration rows are fewer than two "
            f"steps of reconstruct_batch={batch}"
        )
    return int(batch)
