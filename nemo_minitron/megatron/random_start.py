"""A model's random start, the same in every layout: the baseline beside a pruned student."""

from __future__ import annotations

import hashlib

import numpy as np

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts.digest import Index
from nemo_minitron.sources.tensors import RAW

STD = 0.02  # as Megatron's `init_method_std`


class RandomStart:
    """A TensorSource of normal weights: 0.02, divided by sqrt(2 layers) where a layer writes into the residual
    stream (as Megatron's scaled initialisation); norms are 1, biases 0. Each tensor has a seed of its own."""

    def __init__(self, architecture: Architecture, seed: int) -> None:
        self.architecture, self.seed = architecture, seed
        self._shapes = architecture.shapes()

    def dtype(self, name: str) -> str:
        return "F32"

    def read(self, name: str, index: Index) -> np.ndarray:
        shape = self._shapes[name]
        if name.endswith(".bias"):
            values = np.zeros(shape, np.float32)
        elif "norm" in name:
            values = np.ones(shape, np.float32)
        else:
            own = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
            values = np.random.default_rng([self.seed, own]).normal(0, self._std(name), shape).astype(np.float32)
        return values[np.ix_(*index)].view(RAW["F32"])

    def _std(self, name: str) -> float:
        writes = name.endswith((".o.weight", ".down.weight"))
        return STD / (2 * self.architecture.num_layers) ** 0.5 if writes else STD
