"""longrope on Megatron-Bridge: its provider with the factors, and a rotary embedding that has a set for each length.

Megatron-core has no longrope. A checkpoint names this provider, so that Bridge without this package refuses it and does
not run it with other frequencies.

Shapes (docs/shapes.md): S positions of the sequence, R rotary frequencies of a head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor


@dataclasses.dataclass
class LongRopeProvider(GPTModelProvider):
    """Bridge's provider of GPT models with the fields of `families.longrope.FIELDS`."""

    longrope_short_factor: Sequence[float] = ()
    longrope_long_factor: Sequence[float] = ()
    longrope_original_max_position_embeddings: int = 0
    longrope_max_position_embeddings: int = 0

    def provide(
        self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> Any:
        model = super().provide(pre_process, post_process, vp_stage)
        model.rotary_pos_emb = LongRope(self, model.pg_collection.cp)
        return model


class LongRope(RotaryEmbedding):
    """Angles of a sequence: by the short factors up to the original length, by the long ones beyond it.

    The length is that of the whole sequence, of all context-parallel ranks and with its padding; of packed rows that of
    the longest sample."""

    inv_freq: Tensor

    def __init__(self, config: LongRopeProvider, cp_group: Any) -> None:
        super().__init__(
            config.kv_channels, config.rotary_percent, rotary_base=config.rotary_base,
            use_cpu_initialization=config.use_cpu_initialization, cp_group=cp_group,
        )  # fmt: skip
        self.original = config.longrope_original_max_position_embeddings
        rotated = 2 * len(self.inv_freq)
        base_R = config.rotary_base ** (torch.arange(0, rotated, 2, dtype=torch.float32) / rotated)
        short_R, long_R = (torch.tensor(f) for f in (config.longrope_short_factor, config.longrope_long_factor))
        self._short_R, self._long_R = 1 / (short_R * base_R), 1 / (long_R * base_R)

    def get_freqs_non_repeated(self, max_seq_len: int, offset: int = 0) -> Tensor:
        """fp32 [S, R]: the angles of the positions."""
        frequencies_R = self._long_R if max_seq_len + offset > self.original else self._short_R
        self.inv_freq = frequencies_R.to(self.inv_freq.device)
        return super().get_freqs_non_repeated(max_seq_len, offset)

    def forward(self, *arguments: Any, **options: Any) -> tuple[Tensor, None]:
        """The angles, and nothing in the place of YaRN's scale, which attention takes from the config."""
        return super().forward(*arguments, **options), None
