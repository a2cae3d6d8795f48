"""Sums of a loss's parts over a global step. Each rank adds what it computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core import parallel_state
from torch import Tensor

TOKENS = "tokens"


class Meter:
    """Sums by name, in float64. `reduce` is collective over the whole job and gives the same bits on every rank."""

    def __init__(self, names: Sequence[str]) -> None:
        self.parts = tuple(names)
        self.names = (*names, TOKENS)
        self._sums = self._zeros()

    def _zeros(self) -> Tensor:
        return torch.zeros(len(self.names), dtype=torch.float64, device=torch.cuda.current_device())

    def add(self, name: str, total: Tensor, *, sharded: bool = False) -> None:
        """Adds the sum over this rank's tokens. `sharded`: each tensor-parallel rank has its own tokens; otherwise all
        have the same ones, and only the first is counted."""
        if sharded or parallel_state.get_tensor_model_parallel_rank() == 0:
            self._sums[self.names.index(name)] += total.detach()

    def reduce(self) -> dict[str, float]:
        """The mean of each part over the tokens that count, and their number. The sums start again at 0."""
        sums, self._sums = self._sums, self._zeros()
        torch.distributed.all_reduce(sums)
        torch.distributed.broadcast(sums, 0)
        totals = dict(zip(self.names, sums.tolist(), strict=True))
        count = max(1.0, totals.pop(TOKENS))
        return {name: total / count for name, total in totals.items()} | {TOKENS: count}
