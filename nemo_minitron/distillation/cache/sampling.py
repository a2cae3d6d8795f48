"""Tokens of a teacher's distribution, drawn or chosen on vocabulary shards. They are the same in every layout.

A draw is a number in [0, 1), and the token is where the cumulative distribution passes that number. The numbers come
from a counter-based generator (Philox), whose key is the seed and the row's tokens. So they do not depend on rank,
batch or order. Cumulative sums are float64. From the same logits another sharding moves them by 1e-16; from logits that
were summed in another order it moves them by what those differ. Only a draw that lies so near to a border changes its
token.

Shapes (docs/shapes.md): N positions, W columns of the vocabulary on this rank (without padding), K draws or kept
entries, R ranks, I items (the file says at each place which).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nemo_minitron.artifacts.cache_settings import CacheSettings
from nemo_minitron.backend.collectives import gather, gather_stacked, rank_and_size

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

CHUNK = 1 << 21  # logits that are converted to float64 at a time


def uniforms(settings: CacheSettings, key: int, number: int) -> np.ndarray:
    """float64 [sequence_length, draws] in [0, 1], rising: the draws of one row in the set of this number.

    `key`: of the row (`artifacts.logit_cache.row_key`).
    """
    philox = np.random.Philox(key=np.array([settings.seed, key], np.uint64), counter=[0, 0, 0, number])
    values = np.random.Generator(philox).random((settings.sequence_length, settings.draws))
    if settings.independent:
        return np.sort(values, axis=1)
    return (values + np.arange(settings.draws)) / settings.draws


def draw(
    logits: Tensor, numbers: Tensor, temperature: float = 1.0, proposal_temperature: float = 1.0,
    group: ProcessGroup | None = None, first: int = 0,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Tokens by inverse cumulative distribution: int64 [N, K] global ids, and float32 [N, K] p / q of each.

    `logits`: [N, W], this rank's true columns (perhaps none), bf16 or fp32. `first`: the global id of the first column.
    `numbers`: float64 [N, K] in [0, 1]. p = softmax(logits / T), q = softmax(logits / (T * T_q)). At T_q = 1 they are
    equal, and there is no ratio (None). The result is the same on every rank of `group`. Three collectives.
    """
    heat = temperature * proposal_temperature
    max_N = _largest(logits, group)
    sum_N = torch.empty(len(logits), dtype=torch.float64, device=logits.device)
    for chunk in _chunks(logits):
        sum_N[chunk] = _exponentials(logits[chunk], max_N[chunk], heat).sum(1, dtype=torch.float64)
    end_RN = gather_stacked(sum_N, group).cumsum(0)  # where the cumulative sum leaves each rank's columns
    total_N, rank = end_RN[-1], rank_and_size(group)[0]
    start_N = end_RN[rank - 1] if rank else torch.zeros_like(end_RN[0])
    wanted_NK = torch.minimum(numbers * end_RN[-1, :, None], _below(total_N)[:, None])
    here_NK = (wanted_NK >= start_N[:, None]) & (wanted_NK < end_RN[rank][:, None])
    tokens_NK = torch.zeros(numbers.shape, dtype=torch.int64, device=logits.device)
    for chunk in _chunks(logits) if logits.shape[1] else []:
        rising_NW = _exponentials(logits[chunk], max_N[chunk], heat).cumsum(1, dtype=torch.float64)
        local_NK = (wanted_NK[chunk] - start_N[chunk, None]).clamp(min=0)
        local_NK = torch.minimum(local_NK, _below(rising_NW[:, -1])[:, None])
        tokens_NK[chunk] = torch.searchsorted(rising_NW, local_NK, right=True)
    tokens_NK = _summed(torch.where(here_NK, tokens_NK + first, 0), group)
    if proposal_temperature == 1.0:
        return tokens_NK, None
    shifted_NK = _logits_of(logits, tokens_NK, first, group) - max_N[:, None]
    normalizer_N = _normalizer(logits, max_N, temperature, group)
    ratio_NK = shifted_NK / temperature - normalizer_N[:, None] - shifted_NK / heat + total_N.log()[:, None]
    return tokens_NK, ratio_NK.exp().float()


def top(
    logits: Tensor, k: int, temperature: float = 1.0, group: ProcessGroup | None = None, first: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """The k most likely tokens: int64 [N, K] global ids, float32 [N, K] their p, float32 [N] the mass of all others.

    `logits`: as in `draw`. Of equal logits at the k-th place any may be chosen. K is k, or less if the vocabulary is
    smaller.
    """
    local = min(k, logits.shape[1])
    values_NK, ids_NK = logits.topk(local, dim=1)
    values_NK = torch.nn.functional.pad(values_NK.float(), (0, k - local), value=-torch.inf)
    ids_NK = torch.nn.functional.pad(ids_NK + first, (0, k - local), value=-1)
    # Candidates of all ranks, from which the k largest are chosen.
    values_NI, ids_NI = (torch.cat(gather(x, group), dim=1) for x in (values_NK, ids_NK))
    count = min(k, int(_summed(torch.tensor(logits.shape[1], device=logits.device), group)))
    values_NK, chosen_NK = values_NI.topk(count, dim=1)
    max_N, sum_N = values_NK[:, 0], torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
    for chunk in _chunks(logits):
        sum_N[chunk] = _exponentials(logits[chunk], max_N[chunk], temperature).sum(1, dtype=torch.float64)
    total_N = gather_stacked(sum_N, group).sum(0)
    exp_NK = _exponentials(values_NK, max_N, temperature).double()
    tail_N = (total_N - exp_NK.sum(1)).clamp(min=0) / total_N if count == k else torch.zeros_like(total_N)
    return ids_NI.gather(1, chosen_NK), (exp_NK / total_N[:, None]).float(), tail_N.float()


def ragged(
    tokens: np.ndarray, factors: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Draws [N, K] -> (lengths [N], ids [I], counts [I], factors [I] or None). Each token of a position stands once.

    I: the different tokens of all positions, one position after another.
    """
    order_NK = np.argsort(tokens, axis=1, kind="stable")
    sorted_NK = np.take_along_axis(tokens, order_NK, axis=1)
    first_NK = np.ones(sorted_NK.shape, bool)  # whether it is the first of equal tokens
    first_NK[:, 1:] = sorted_NK[:, 1:] != sorted_NK[:, :-1]
    starts_I = np.flatnonzero(first_NK)
    counts_I = np.diff(np.append(starts_I, sorted_NK.size))
    if factors is not None:
        factors = np.take_along_axis(factors, order_NK, axis=1).reshape(-1)[starts_I]
    return first_NK.sum(1), sorted_NK.reshape(-1)[starts_I], counts_I, factors


# -- over the shards -------------------------------------------------------------------------------------
def _summed(local: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum over the ranks, in place."""
    if rank_and_size(group)[1] > 1:
        torch.distributed.all_reduce(local, group=group)
    return local


def _largest(logits_NW: Tensor, group: ProcessGroup | None) -> Tensor:
    """float32 [N]: the largest logit of the whole vocabulary."""
    if not logits_NW.shape[1]:
        local_N = torch.full((len(logits_NW),), -torch.inf, device=logits_NW.device)
    else:
        local_N = logits_NW.amax(1).float()
    return gather_stacked(local_N, group).amax(0)


def _normalizer(logits_NW: Tensor, max_N: Tensor, temperature: float, group: ProcessGroup | None) -> Tensor:
    """float64 [N]: log of the sum of exp((logits - max) / temperature) over the whole vocabulary."""
    sum_N = torch.zeros(len(logits_NW), dtype=torch.float64, device=logits_NW.device)
    for chunk in _chunks(logits_NW):
        sum_N[chunk] = _exponentials(logits_NW[chunk], max_N[chunk], temperature).sum(1, dtype=torch.float64)
    return _summed(sum_N, group).log()


def _logits_of(logits_NW: Tensor, tokens_NK: Tensor, first: int, group: ProcessGroup | None) -> Tensor:
    """float64 [N, K]: the logits of global ids, wherever they are."""
    columns_NK = tokens_NK - first
    here_NK = (columns_NK >= 0) & (columns_NK < logits_NW.shape[1])
    if not logits_NW.shape[1]:
        return _summed(torch.zeros(tokens_NK.shape, dtype=torch.float64, device=logits_NW.device), group)
    values_NK = logits_NW.gather(1, columns_NK.clamp(0, logits_NW.shape[1] - 1)).double()
    return _summed(torch.where(here_NK, values_NK, 0.0), group)


# -- in a shard ------------------------------------------------------------------------------------------
def _chunks(logits_NW: Tensor) -> list[slice]:
    step = max(1, CHUNK // max(1, logits_NW.shape[1]))
    return [slice(first, first + step) for first in range(0, len(logits_NW), step)]


def _exponentials(logits_NW: Tensor, max_N: Tensor, temperature: float) -> Tensor:
    return (logits_NW.float() - max_N[:, None]).div_(temperature).exp_()


def _below(x: Tensor) -> Tensor:
    """The next smaller number: a draw of 1.0 must still fall into the last token."""
    return torch.nextafter(x, torch.full_like(x, -torch.inf))
