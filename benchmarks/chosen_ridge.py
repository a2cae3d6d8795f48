"""The ridge of each re-fitted matrix, chosen on calibration rows that its fit did not read. No forward pass is needed:
two Gram matrices, one of each half of the rows, give the error of a fit to one half on the other.

Shapes: D input channels of a matrix, K those that stay, I those that are cut, O output channels, R candidates.
"""

from __future__ import annotations

from typing import Any

import numpy as np

RIDGES = np.geomspace(1e-4, 1.0, 13)


def chosen(source: Any, plan: Any, name: str, halves: tuple[np.ndarray, np.ndarray]) -> float:
    """The candidate whose fits to either half leave the least error on the other one, both together."""
    from nemo_minitron.artifacts.dtypes import as_numbers
    from nemo_minitron.pruning.selection import shapes_of, student_index

    origin, (rows, kept) = student_index(plan, name)
    every = np.arange(shapes_of(plan.source)[origin][1])
    weight_OD = as_numbers(source.read(origin, (rows, every)), source.dtype(origin)).astype(np.float64)
    first, second = halves
    return float(RIDGES[np.argmin(errors(weight_OD, kept, first, second) + errors(weight_OD, kept, second, first))])


def errors(weight_OD: np.ndarray, kept: np.ndarray, fit_DD: np.ndarray, test_DD: np.ndarray) -> np.ndarray:
    """[R]: for each candidate, the squared error over the tokens of `test_DD` of the matrix solved on `fit_DD`.

    The solved change is C (V + r)^-1 Q', with V and Q the eigenvalues and vectors of the fit's Gram matrix of the kept
    channels. In that basis the error is a quadratic form in 1 / (V + r), so all candidates cost one eigenproblem."""
    gone = np.setdiff1d(np.arange(len(fit_DD)), kept)
    lost_OI, both, across = weight_OD[:, gone], np.ix_(kept, kept), np.ix_(gone, kept)
    values_K, basis_KK = np.linalg.eigh(fit_DD[both])
    pull_OK, aim_OK = ((lost_OI @ gram[across]) @ basis_KK for gram in (fit_DD, test_DD))
    square_KK = (pull_OK.T @ pull_OK) * (basis_KK.T @ test_DD[both] @ basis_KK)
    scale_RK = 1 / (values_K + RIDGES[:, None] * values_K.mean())
    plain = np.einsum("oi,oi->", lost_OI @ test_DD[np.ix_(gone, gone)], lost_OI)
    return plain - 2 * scale_RK @ (pull_OK * aim_OK).sum(0) + ((scale_RK @ square_KK) * scale_RK).sum(1)
