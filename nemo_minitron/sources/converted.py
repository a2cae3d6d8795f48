"""A source converted to another dtype: a student that was trained in fp32 is stored in the dtypes of its folder."""

from __future__ import annotations

import numpy as np

from nemo_minitron.artifacts.digest import Index
from nemo_minitron.sources.bits import TORCH_DTYPES, as_raw, as_tensor
from nemo_minitron.sources.tensors import TensorSource


class Converted:
    """`source` with each tensor rounded to the dtype that `stored` has for it."""

    def __init__(self, source: TensorSource, stored: TensorSource) -> None:
        self.source, self.stored = source, stored
        self.architecture = source.architecture

    def dtype(self, name: str) -> str:
        return self.stored.dtype(name)

    def read(self, name: str, index: Index) -> np.ndarray:
        raw, ours, theirs = self.source.read(name, index), self.source.dtype(name), self.dtype(name)
        return raw if ours == theirs else as_raw(as_tensor(raw, ours).to(TORCH_DTYPES[theirs]))
