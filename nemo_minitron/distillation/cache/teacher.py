"""The cached teacher in a student's training: rows of tokens in, targets out, and no model in memory.

Shapes (docs/shapes.md): B sequences, S positions of the sequence, K kept entries of a token.
"""

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
    """`folder`: a cache of `minitron cache-logits`. Raises InputError if the cache is not complete."""

    def __init__(self, folder: str | Path) -> None:
        self.cache = LogitCache(folder)
        self.settings = self.cache.header.settings

    def targets(self, tokens: Tensor, epochs: Sequence[int] | Tensor | None = None) -> CachedTargets:
        """Targets of complete rows, on the CPU: `ids` and `weights` [B, S, K], `tail` [B, S] or None.

        `tokens`: int64 [B, S], before anything cuts them over ranks. `epochs`: how often each row was used before
        (default 0); it chooses the set of draws. Reads B records. Raises InputError for a row that the cache does not
        have.
        """
        tokens_BS = tokens.cpu().numpy()
        epochs = [0] * len(tokens_BS) if epochs is None else [int(epoch) for epoch in epochs]
        records = [self.cache.read(self.cache.find(row), epoch) for row, epoch in zip(tokens_BS, epochs, strict=True)]
        longest = max(int(record.lengths.max(initial=1)) for record in records)
        ids_BSK, weights_BSK = map(np.stack, zip(*(self._dense(record, longest) for record in records), strict=True))
        tails = [record.tail for record in records if record.tail is not None]
        tail_BS = torch.from_numpy(np.stack(tails)) if tails else None
        return CachedTargets(torch.from_numpy(ids_BSK), torch.from_numpy(weights_BSK), tail_BS)

    def loss(self, student_logits: Tensor, targets: CachedTargets, **options: Any) -> Tensor:
        """The loss that belongs to the cache's mode, at the cache's temperature: [..., V/tp] -> [...] fp32.

        `options`: `group`, `vocab_size` and `in_place` of the losses.
        """
        function = sampled_cross_entropy if self.settings.sampled else cached_top_k_kl
        return function(student_logits, targets, self.settings.temperature, **options)

    @property
    def loss_name(self) -> str:
        """The name of the loss. Only a top-k cache knows enough of the teacher for a divergence."""
        return "cross_entropy" if self.settings.sampled else "top_k_kl"

    def _dense(self, kept: Kept, longest: int) -> tuple[np.ndarray, np.ndarray]:
        """A ragged record -> ids and weights [S, K], filled up with -1 and 0."""
        present_SK = np.arange(longest) < kept.lengths[:, None]
        ids_SK, weights_SK = np.full(present_SK.shape, -1, np.int64), np.zeros(present_SK.shape, np.float32)
        ids_SK[present_SK], weights_SK[present_SK] = kept.ids, kept.weights(self.settings.draws)
        return ids_SK, weights_SK
