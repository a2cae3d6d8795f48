"""Random weights for a model, the same in every layout. They are the baseline that a pruned student is compared with.

Shapes (docs/shapes.md): X the dimensions of a tensor.
"""

from __future__ import annotations

import hashlib

import numpy as np

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts.digest import Index
from nemo_minitron.sources.tensors import RAW

STD = 0.02  # the default of Megatron's `init_method_std`


class RandomStart:
    """A TensorSource of random weights, in fp32.

    The standard deviation is 0.02, or 0.02 / sqrt(2 * layers) for a matrix that writes into the residual stream, as in
    Megatron's scaled initialisation. Norms are 1 and biases 0. Each tensor has its own seed, made from `seed` and its
    name, so that a rank can read its shard without drawing the other tensors.
    """

    def __init__(self, architecture: Architecture, seed: int) -> None:
        self.architecture, self.seed = architecture, seed
        self._shapes = architecture.shapes()

    def dtype(self, name: str) -> str:
        return "F32"

    def read(self, name: str, index: Index) -> np.ndarray:
        """The raw bits (uint32) of the block that `index` selects. Every call draws the whole tensor again."""
        shape = self._shapes[name]
        if name.endswith((".bias", ".expert_bias")):
            values_X = np.zeros(shape, np.float32)
        elif "norm" in name:
            values_X = np.ones(shape, np.float32)
        else:
            tensor_seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
            random = np.random.default_rng([self.seed, tensor_seed])
            values_X = random.normal(0, self._std(name), shape).astype(np.float32)
        return values_X[np.ix_(*index)].view(RAW["F32"])

    def _std(self, name: str) -> float:
        writes = name.endswith((".o.weight", ".down.weight"))
        return STD / (2 * self.architecture.num_layers) ** 0.5 if writes else STD
