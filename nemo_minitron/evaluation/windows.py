"""What a model says of each window of a text, kept to compare a student with its teacher on the same windows.

Shapes: N windows, P predicted positions of a window (its tokens less one).
"""

from __future__ import annotations

import dataclasses
import math
import zipfile
from pathlib import Path

import numpy as np

from nemo_minitron.artifacts.files import atomic_file
from nemo_minitron.artifacts.json_types import JsonObject
from nemo_minitron.errors import InputError


@dataclasses.dataclass(frozen=True)
class Windows:
    """`nats_N`: float64, summed cross entropy of each window. `likeliest_NP`: int32, the model's likeliest next token
    at each position."""

    nats_N: np.ndarray
    likeliest_NP: np.ndarray

    @property
    def losses_N(self) -> np.ndarray:
        """Nats a token of each window, float64."""
        return self.nats_N / self.likeliest_NP.shape[1]

    def save(self, path: Path) -> None:
        with atomic_file(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, nats=self.nats_N, likeliest=self.likeliest_NP)

    @classmethod
    def load(cls, path: Path) -> Windows:
        """Raises InputError for a file that is missing or damaged."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return cls(arrays["nats"], arrays["likeliest"])
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise InputError(f"the teacher's windows '{path}' cannot be read ({error}); remove the file") from None

    def beside(self, teacher: Windows) -> JsonObject:
        """`gap`: the loss above the teacher's, in nats a token; `agreement`: the share of positions at which both
        models' likeliest token is the same; and their standard errors over windows, None for a single window. The gap
        is taken window by window, so that what is hard in the text does not count as noise. {} for other windows."""
        if self.likeliest_NP.shape != teacher.likeliest_NP.shape:
            return {}
        same_N = (self.likeliest_NP == teacher.likeliest_NP).mean(axis=1)
        gap_N = self.losses_N - teacher.losses_N
        return {
            "gap": float(gap_N.mean()), "gap_error": standard_error(gap_N),
            "agreement": float(same_N.mean()), "agreement_error": standard_error(same_N),
        }  # fmt: skip


def standard_error(values_N: np.ndarray) -> float | None:
    """The standard error of a mean; None for a single value."""
    return float(values_N.std(ddof=1) / math.sqrt(len(values_N))) if len(values_N) > 1 else None
