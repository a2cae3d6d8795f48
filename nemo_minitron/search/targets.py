"""Targets of a search: the cost that a shape may have."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import numpy as np

from nemo_minitron.architecture import Architecture
from nemo_minitron.errors import InputError
from nemo_minitron.search.formula import Cost


@dataclasses.dataclass(frozen=True)
class Target:
    """A band of relative `tolerance` around `value` of a cost, ends included; tolerance None: anything up to `value`.

    `unit` and `name` are for messages. Raises InputError for a value below 1 or a tolerance outside [0, 1).
    """

    name: str
    value: int
    cost: Cost
    tolerance: float | None = None
    unit: str = ""

    def __post_init__(self) -> None:
        if self.value < 1:
            raise InputError(
                f"the target for {self.name} is {self.value}; the nearest legal one is 1, and a share of the model's "
                "is written as 0.7x"
            )
        if self.tolerance is not None and not 0 <= self.tolerance < 1:
            raise InputError(f"a tolerance of {self.tolerance:.0%} is not legal; legal are 0% to 99%, the usual is 5%")

    @property
    def ends(self) -> tuple[int, int]:
        """The least and the largest cost that meet the target."""
        if self.tolerance is None:
            return 0, self.value
        part = Fraction(str(self.tolerance)) * self.value
        return math.ceil(self.value - part), math.floor(self.value + part)

    def misses(self, costs: np.ndarray) -> np.ndarray:
        """The distance of each cost from the band, relative to the target's value; 0 if the cost meets the target."""
        low, high = self.ends
        return np.maximum(np.maximum(low - costs, costs - high), 0) / self.value

    def __str__(self) -> str:
        low, high = self.ends
        if self.tolerance is None:
            return f"at most {self.value:,} {self.unit or self.name}"
        return f"{low:,} to {high:,} {self.unit or self.name}"


def parameters(
    value: int, tolerance: float | None = 0.05, *, embeddings: bool = True, active: bool = False
) -> Target:  # fmt: skip
    """A band of parameters, as in the papers; with tolerance None at most so many. All of them count, those without
    embeddings, or those active for one token."""
    name = "active parameters" if active else "parameters" if embeddings else "parameters without embeddings"

    def cost(a: Architecture) -> int:
        return a.parameters(embeddings=embeddings, active=active)

    return Target(name, value, cost, tolerance)


def memory(value: int, *, batch: int = 1, context: int = 4096, weights: str = "bf16", kv_cache: str = "bf16") -> Target:
    """At most `value` bytes of weights and of the KV cache of `batch` sequences of `context` tokens."""

    def cost(a: Architecture) -> int:
        return a.memory(batch=batch, context=context, weights=weights, kv_cache=kv_cache)

    return Target("memory", value, cost, unit="bytes")


def flops(value: int, *, context: int = 4096) -> Target:
    """At most `value` forward FLOPs of one token at position `context`."""
    return Target("FLOPs", value, lambda a: a.flops_per_token(context), unit="FLOPs a token")
