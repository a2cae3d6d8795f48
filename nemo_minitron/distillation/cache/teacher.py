"""The teacher as a student's training sees it: rows of tokens in, targets out; no model in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemo_minitron.artifacts.logit_cache import LogitCache
from nemo_minitron.artifacts.logit_records import Kept
from nemo_minitron.distillation.cache.losses import CachedTargets, cached_top_k_kl, sampled_cross_entropy


class CachedTeacher:
    """`folder`: a cache of `minitron cache-logits`. Raises InputError where it is not whole."""

    def __init__(self, folder: str | Path) -> None:
        self.cache = LogitCache(folder)
        self.settings = self.cache.header.settings

    def targets(self, tokens: Tensor, epochs: Sequence[int] | Tensor | None = None) -> CachedTargets:
        """Targets of whole rows, on the CPU: `ids` and `weights` [B, S, K], `tail` [B, S] or None.

        `tokens`: int64 [B, S], as a batch has them before anything cuts them over ranks; `epochs`: how often the
        row was dealt out before (default 0), which chooses the set of draws. Reads B records.
        Raises InputError for a row that the cache does not have.
        """
        rows = tokens.cpu().numpy()
        numbers = [0] * len(rows) if epochs is None else [int(e) for e in epochs]
        kept = [self.cache.read(self.cache.find(r), e) for r, e in zip(rows, numbers, strict=True)]
        longest = max(int(k.lengths.max(initial=1)) for k in kept)
        ids, weights = zip(*(self._dense(k, longest) for k in kept), strict=True)
        tails = [k.tail for k in kept if k.tail is not None]
        tail = torch.from_numpy(np.stack(tails)) if tails else None
        return CachedTargets(torch.from_numpy(np.stack(ids)), torch.from_numpy(np.stack(weights)), tail)

    def loss(self, student_logits: Tensor, targets: CachedTargets, **options: Any) -> Tensor:
        """The loss that belongs to the cache's mode, at the cache's temperature: [..., V/tp] -> [...] fp32.

        `options`: `group`, `vocab_size` and `in_place`, as the losses have them.
        """
        function = sampled_cross_entropy if self.settings.sampled else cached_top_k_kl
        return function(student_logits, targets, self.settings.temperature, **options)

    @property
    def loss_name(self) -> str:
        """What the loss is: only a top-k cache knows enough of the teacher for a divergence."""
        return "cross_entropy" if self.settings.sampled else "top_k_kl"

    def _dense(self, kept: Kept, longest: int) -> tuple[np.ndarray, np.ndarray]:
        """Ragged -> [S, K]: ids filled up with -1, weights with 0."""
        filled = np.arange(longest) < kept.lengths[:, None]
        ids, weights = np.full(filled.shape, -1, np.int64), np.zeros(filled.shape, np.float32)
        ids[filled], weights[filled] = kept.ids, kept.weights(self.settings.draws)
        return ids, weights
