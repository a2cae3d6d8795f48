"""An MLP cut to fewer neurons, and three ways to make it write what the whole one wrote: its slices, its last matrix by
least squares, all of its matrices by Adam. Plain PyTorch.

Shapes: T tokens, H hidden channels, K neurons that stay.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from dense_students import Dense
from torch import Tensor

CHUNK = 4096  # tokens that pass an MLP at a time


@dataclasses.dataclass(frozen=True)
class Pairs:
    """What an MLP reads and what it should write, [T, H] each. `weights_T1`: of each token's squared error."""

    inputs_TH: Tensor
    aims_TH: Tensor
    weights_T1: Tensor

    def part(self, at: Any) -> Pairs:
        return Pairs(self.inputs_TH[at], self.aims_TH[at], self.weights_T1[at])

    def chunks(self) -> Iterator[Pairs]:
        return (self.part(slice(at, at + CHUNK)) for at in range(0, len(self.inputs_TH), CHUNK))


@dataclasses.dataclass(frozen=True)
class Fit:
    """Adam's settings: `batch` in tokens; the rate falls to 0 as a cosine after `warmup` of the steps; `checks`: how
    often the held-out residual is measured, of which the best one's matrices are kept (early stopping)."""

    peak: float = 1e-3
    batch: int = 256
    warmup: float = 0.05
    checks: int = 8

    def rate(self, share: float) -> float:
        return self.peak * min(share / self.warmup, 0.5 + 0.5 * math.cos(math.pi * share))


def kept_neurons(mlp: Any, inputs_TH: Tensor, count: int) -> Tensor:
    """The neurons with the highest mean |activation|, in order, int64 [K]."""
    total = torch.zeros(mlp.down_proj.in_features)
    for x in inputs_TH.split(CHUNK):
        total += (mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)).abs().sum(0)
    return total.topk(count).indices.sort().values


def slices(mlp: Any, kept_K: Tensor) -> Dense:
    return Dense(mlp.gate_proj.weight[kept_K], mlp.up_proj.weight[kept_K], mlp.down_proj.weight[:, kept_K])


@torch.no_grad()
def least_squares(start: Dense, learn: Pairs, ridge: float) -> Dense:
    """`start` with another last matrix: that of `minitron compensate` if the pairs are the teacher's and the weights 1.

    The ridge, times the mean diagonal of the Gram matrix, pulls to the matrix of `start`. Solved in float64."""
    width = len(start.gate)
    gram_KK, cross_KH = (torch.zeros(width, size, dtype=torch.float64) for size in (width, learn.aims_TH.shape[1]))
    for part in learn.chunks():
        inner = start.inner(part.inputs_TH)
        weighted = inner * part.weights_T1
        gram_KK += (weighted.T @ inner).double()
        cross_KH += (weighted.T @ (part.aims_TH - inner @ start.down.T)).double()
    gram_KK.diagonal().add_(ridge * gram_KK.diagonal().mean())
    return Dense(start.gate, start.up, start.down + torch.linalg.solve(gram_KK, cross_KH).T.float())


@torch.no_grad()
def residual(mlp: Dense, pairs: Pairs, weighted: bool = True) -> float:
    """The squared error over the square of the aims."""
    errors = squares = 0.0
    for part in pairs.chunks():
        weights = part.weights_T1 if weighted else 1.0
        errors += float((weights * (mlp(part.inputs_TH) - part.aims_TH).square()).double().sum())
        squares += float((weights * part.aims_TH.square()).double().sum())
    return errors / squares


def fit(start: Dense, learn: Pairs, check: Pairs, steps: int, how: Fit, seed: int) -> tuple[Dense, list[float]]:
    """(all matrices of `start` fitted by Adam on mini-batches of tokens, the residual on `check` at each look)."""
    made, best = (Dense(start.gate, start.up, start.down) for _ in range(2))
    scale = float((learn.weights_T1 * learn.aims_TH.square()).mean())
    optimizer = torch.optim.AdamW(made.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    found, looks = [residual(made, check)], {round(steps * n / how.checks) for n in range(1, how.checks + 1)}
    for step, rows in enumerate(mini_batches(len(learn.inputs_TH), how.batch, steps, seed), 1):
        part = learn.part(rows)
        loss = (part.weights_T1 * (made(part.inputs_TH) - part.aims_TH).square()).mean() / scale
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = how.rate((step - 0.5) / steps)
        optimizer.step()
        if step in looks:
            found.append(residual(made, check))
            if found[-1] == min(found):
                best.load_state_dict(made.state_dict())
    return best, found


def mini_batches(tokens: int, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Random tokens without repetition; in a new order after each pass."""
    draw, order = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < batch:
            order = torch.randperm(tokens, generator=draw)
        rows, order = order[:batch], order[batch:]
        yield rows
