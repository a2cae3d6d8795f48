"""Tokens of a teacher's distribution, drawn or chosen on vocabulary shards; the same in every layout.

A draw is a number in [0, 1) and the token at which the cumulative distribution passes it. The numbers come from a
counter-based generator (Philox) keyed by the seed and the row's tokens, so that no rank, batch or order has a part
in them. Cumulative sums are float64: with the same logits another sharding moves them by 1e-16, with logits of
another summation order by what those differ, and only a draw that lies so near to a border changes its token.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemo_minitron.artifacts.cache_settings import CacheSettings

CHUNK = 1 << 21  # logits that are held in float64 at a time


def uniforms(settings: CacheSettings, key: int, number: int) -> np.ndarray:
    """float64 [sequence_length, draws] in [0, 1], rising: the draws of a row (by its key) in one set."""
    philox = np.random.Philox(key=np.array([settings.seed, key], np.uint64), counter=[0, 0, 0, number])
    values = np.random.Generator(philox).random((settings.sequence_length, settings.draws))
    if settings.independent:
        return np.sort(values, axis=1)
    return (values + np.arange(settings.draws)) / settings.draws


def draw(
    logits: Tensor, numbers: Tensor, temperature: float = 1.0, proposal_temperature: float = 1.0, group: Any = None,
    first: int = 0,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Tokens by inverse cumulative distribution: int64 [P, n] global ids, and float32 [P, n] p / q of each.

    `logits`: [P, V/tp], this rank's true columns (perhaps none), bf16 or fp32; `first`: the global id of the first
    of them; `numbers`: float64 [P, n] in [0, 1]. p = softmax(logits / T), q = softmax(logits / (T * T_q)); at T_q = 1
    they are one, and there is no ratio (None). The same on every rank of `group`; three collectives.
    """
    heat = temperature * proposal_temperature
    top = _largest(logits, group)
    sums = torch.empty(len(logits), dtype=torch.float64, device=logits.device)
    for at in _chunks(logits):
        sums[at] = _exponentials(logits[at], top[at], heat).sum(1, dtype=torch.float64)
    every = _gathered(sums, group)  # [tp, P]
    ends = every.cumsum(0)
    rank = _rank(group)
    before = ends[rank - 1] if rank else torch.zeros_like(ends[0])
    wanted = torch.minimum(numbers * ends[-1, :, None], _below(ends[-1])[:, None])
    mine = (wanted >= before[:, None]) & (wanted < ends[rank][:, None])
    tokens = torch.zeros(numbers.shape, dtype=torch.int64, device=logits.device)
    for at in _chunks(logits) if logits.shape[1] else []:
        rising = _exponentials(logits[at], top[at], heat).cumsum(1, dtype=torch.float64)
        local = torch.minimum((wanted[at] - before[at, None]).clamp(min=0), _below(rising[:, -1])[:, None])
        tokens[at] = torch.searchsorted(rising, local, right=True)
    tokens = _summed(torch.where(mine, tokens + first, 0), group)
    if proposal_temperature == 1.0:
        return tokens, None
    log_p = _chosen(logits, tokens, first, group) - top[:, None]
    normalizer = _normalizer(logits, top, temperature, group)
    ratio = log_p / temperature - normalizer[:, None] - log_p / heat + ends[-1].log()[:, None]
    return tokens, ratio.exp().float()


def top(
    logits: Tensor, k: int, temperature: float = 1.0, group: Any = None, first: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """The k most likely tokens: int64 [P, k] global ids, float32 [P, k] their p, float32 [P] the mass of the rest.

    `logits`: as in `draw`. Of equal logits at the k-th place any may be chosen. Fewer than k where the
    vocabulary has fewer.
    """
    here = min(k, logits.shape[1])
    values, ids = logits.topk(here, dim=1)
    values = torch.nn.functional.pad(values.float(), (0, k - here), value=-torch.inf)
    ids = torch.nn.functional.pad(ids + first, (0, k - here), value=-1)
    values, ids = (torch.cat(list(_gathered(x, group)), dim=1) for x in (values, ids))
    count = min(k, int(_summed(torch.tensor(logits.shape[1], device=logits.device), group)))
    values, places = values.topk(count, dim=1)
    largest, masses = values[:, :1], torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
    for at in _chunks(logits):
        masses[at] = _exponentials(logits[at], largest[at, 0], temperature).sum(1, dtype=torch.float64)
    total = _gathered(masses, group).sum(0)
    exponentials = _exponentials(values, largest[:, 0], temperature).double()
    tail = (total - exponentials.sum(1)).clamp(min=0) / total if count == k else torch.zeros_like(total)
    return ids.gather(1, places), (exponentials / total[:, None]).float(), tail.float()


def ragged(tokens: np.ndarray, factors: np.ndarray | None) -> tuple[Any, ...]:
    """Draws [P, n] -> (lengths [P], ids [N], counts [N], factors [N] or None), each token of a position once."""
    order = np.argsort(tokens, axis=1, kind="stable")
    ordered = np.take_along_axis(tokens, order, axis=1)
    new = np.ones(ordered.shape, bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    starts = np.flatnonzero(new)
    counts = np.diff(np.append(starts, ordered.size))
    kept = None if factors is None else np.take_along_axis(factors, order, axis=1).reshape(-1)[starts]
    return new.sum(1), ordered.reshape(-1)[starts], counts, kept


# -- over the shards -------------------------------------------------------------------------------------
def _rank(group: Any) -> int:
    return torch.distributed.get_rank(group) if group is not None else 0


def _sharded(group: Any) -> bool:
    return group is not None and torch.distributed.get_world_size(group) > 1


def _gathered(local: Tensor, group: Any) -> Tensor:
    """[...] of each rank -> [tp, ...]"""
    if not _sharded(group):
        return local[None]
    parts = [torch.empty_like(local) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, local.contiguous(), group=group)
    return torch.stack(parts)


def _summed(local: Tensor, group: Any) -> Tensor:
    if _sharded(group):
        torch.distributed.all_reduce(local, group=group)
    return local


def _largest(logits: Tensor, group: Any) -> Tensor:
    """float32 [P]: the largest logit of the whole vocabulary."""
    if not logits.shape[1]:
        local = torch.full((len(logits),), -torch.inf, device=logits.device)
    else:
        local = logits.amax(1).float()
    return _gathered(local, group).amax(0)


def _normalizer(logits: Tensor, top: Tensor, temperature: float, group: Any) -> Tensor:
    """float64 [P]: log of the sum of exp((logits - top) / temperature) over the whole vocabulary."""
    sums = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
    for at in _chunks(logits):
        sums[at] = _exponentials(logits[at], top[at], temperature).sum(1, dtype=torch.float64)
    return _summed(sums, group).log()


def _chosen(logits: Tensor, tokens: Tensor, first: int, group: Any) -> Tensor:
    """float64 [P, n]: logits of global ids."""
    local = tokens - first
    mine = (local >= 0) & (local < logits.shape[1])
    if not logits.shape[1]:
        return _summed(torch.zeros(tokens.shape, dtype=torch.float64, device=logits.device), group)
    values = logits.gather(1, local.clamp(0, logits.shape[1] - 1)).double()
    return _summed(torch.where(mine, values, 0.0), group)


# -- in a shard ------------------------------------------------------------------------------------------
def _chunks(logits: Tensor) -> list[slice]:
    step = max(1, CHUNK // max(1, logits.shape[1]))
    return [slice(first, first + step) for first in range(0, len(logits), step)]


def _exponentials(logits: Tensor, top: Tensor, temperature: float) -> Tensor:
    return (logits.float() - top[:, None]).div_(temperature).exp_()


def _below(values: Tensor) -> Tensor:
    return torch.nextafter(values, torch.full_like(values, -torch.inf))
