"""Sums of a loss's parts over a global step, each added where it arises."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core import parallel_state
from torch import Tensor

TOKENS = "tokens"


class Meter:
    """Parts by name, in float64; `reduce` is collective and gives the same bits on every rank."""

    def __init__(self, names: Sequence[str]) -> None:
        self.parts = tuple(names)
        self.names = (*names, TOKENS)
        self._sums = self._zeros()

    def _zeros(self) -> Tensor:
        return torch.zeros(len(self.names), dtype=torch.float64, device=torch.cuda.current_device())

    def add(self, name: str, total: Tensor, *, sharded: bool = False) -> None:
        """The sum over this rank's tokens; `sharded`: its tensor-parallel ranks have other tokens."""
        if sharded or parallel_state.get_tensor_model_parallel_rank() == 0:
            self._sums[self.names.index(name)] += total.detach()

    def reduce(self) -> dict[str, float]:
        """The mean of each part over the tokens that count, and their number; begins anew."""
        sums, self._sums = self._sums, self._zeros()
        torch.distributed.all_reduce(sums)
        torch.distributed.broadcast(sums, 0)
        found = dict(zip(self.names, sums.tolist(), strict=True))
        count = max(1.0, found.pop(TOKENS))
        return {name: value / count for name, value in found.items()} | {TOKENS: count}
