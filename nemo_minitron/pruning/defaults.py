"""Constants that the settings of a cut and its arithmetic share. Plain data, so that a command's help needs no
numpy."""

from __future__ import annotations

RIDGE = 0.01  # damping of least squares, as a part of the mean diagonal of G
GAP_RIDGE = 0.3  # of the matrix in front of dropped layers (docs/benchmarks.md)
AUTO = "auto"  # a ridge for each matrix, chosen on rows that its fit did not read
SIGNS = {"paper": 1.0, "laco": -1.0}  # of the residual of pruned heads
