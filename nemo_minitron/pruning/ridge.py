"""The ridge of a re-fitted matrix, chosen on calibration rows that its fit did not read. Only numpy is needed.

Two Gram matrices, one of each half of the samples, give the error of a fit to one half on the other half. So no further
forward pass is needed.

Shapes (docs/shapes.md): Z halves of the samples, D input channels of a matrix, O its output channels in the student, K
kept input channels. I: the candidates.
"""

from __future__ import annotations

import numpy as np

from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.artifacts.dtypes import as_numbers
from nemo_minitron.axes import split_expert, split_name
from nemo_minitron.errors import InputError
from nemo_minitron.pruning.compensation import check_gram
from nemo_minitron.pruning.defaults import RIDGE
from nemo_minitron.pruning.selection import shapes_of, student_index
from nemo_minitron.sources.tensors import TensorSource

RIDGES = np.geomspace(1e-4, 10, 16)  # three a factor of ten


def chosen_ridge(source: TensorSource, plan: PrunePlan, name: str, halves: np.ndarray) -> float:
    """The candidate with which `solve`, on one half, leaves the least squared error on the other half, both ways added.

    `halves` [Z, D, D], float64: the Gram matrix of each half. A candidate is a share of the mean squared input of both
    halves together. So each fit gets as much damping as the final one, which reads all samples. If the inputs were
    always 0, or if no token of a half came to an expert, nothing can be chosen, and it is the default.

    Raises InputError for Gram matrices that `solve` would refuse, and if all samples fell into one half.
    """
    origin, (rows, kept) = student_index(plan, name)
    size = shapes_of(plan.source)[origin][1]
    for gram_DD in halves:
        check_gram(gram_DD, origin, size)
    empty = [not np.trace(gram_DD[np.ix_(kept, kept)]) for gram_DD in halves]
    if any(empty) and not all(empty) and split_expert(split_name(name)[1])[0] is None:
        raise InputError(
            f"ridge=auto fits '{name}' to one half of the samples and tries it on the other, and all samples fell into "
            f"one half; give more samples, or a number, for example {RIDGE}"
        )
    if any(empty):
        return RIDGE
    weight_OD = as_numbers(source.read(origin, (rows, np.arange(size))), source.dtype(origin)).astype(np.float64)
    damping_I = RIDGES * np.trace(halves.sum(0)[np.ix_(kept, kept)]) / len(kept)
    first, second = halves
    left_I = errors(weight_OD, kept, first, second, damping_I) + errors(weight_OD, kept, second, first, damping_I)
    return float(RIDGES[np.argmin(left_I)])


def errors(
    weight_OD: np.ndarray, kept: np.ndarray, fit_DD: np.ndarray, test_DD: np.ndarray, damping_I: np.ndarray
) -> np.ndarray:
    """float64 [I]: the squared error over the tokens of `test_DD` of the matrix that is solved on `fit_DD`, for each
    damping of its diagonal.

    With V and Q, the eigenvalues and -vectors of the fit's G_KK, the solved change is W G_DK Q (V + damping)^-1 Q^T,
    where W has only its columns that are cut.
    In that basis the error is a quadratic form in (V + damping)^-1, so all candidates cost one eigenproblem.
    """
    lost_OD, both = weight_OD.copy(), np.ix_(kept, kept)
    lost_OD[:, kept] = 0
    values_K, basis_KK = np.linalg.eigh(fit_DD[both])
    change_OK, aim_OK = (lost_OD @ gram_DD[:, kept] @ basis_KK for gram_DD in (fit_DD, test_DD))
    square_KK = (change_OK.T @ change_OK) * (basis_KK.T @ test_DD[both] @ basis_KK)
    scale_IK = 1 / (values_K.clip(min=0) + damping_I[:, None])
    sliced = np.sum(lost_OD @ test_DD * lost_OD)
    return sliced - 2 * scale_IK @ (change_OK * aim_OK).sum(0) + (scale_IK @ square_KK * scale_IK).sum(1)
