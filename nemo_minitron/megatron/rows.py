"""Rows that are cut once from the stream of tokens, whatever the seed. Imports Megatron: load it late."""

from __future__ import annotations

from typing import Any

import numpy as np
from megatron.core.datasets.utils import Split

from nemo_minitron.megatron.dataset import PackedDataset


def stream_rows(rows: int) -> type[PackedDataset]:
    """A dataset of the stream's first `rows` rows of `sequence_length` tokens, each with the label behind its last.

    Megatron shuffles the documents, over all epochs at once, before it cuts them to rows: another seed, or one
    more epoch, and no row is the same. Here the rows stay and their order is shuffled by the seed, anew in each
    epoch, all of them before any comes again; so what is known of a row holds in every run. A sample also has
    `epoch`, int64 []: how often all rows were dealt out before. Validation is as ever.
    """

    class StreamRows(PackedDataset):
        @property
        def training(self) -> bool:
            return self.index_split == Split.train

        def __len__(self) -> int:
            return len(self.shuffle_index) if self.training else super().__len__()

        def __getitem__(self, index: int | None) -> dict[str, Any]:
            return super().__getitem__(index) | {"epoch": np.int64((index or 0) // rows)}

        def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            if not self.training:
                return super()._build_document_sample_shuffle_indices()
            documents = np.asarray(self.indices)
            ends = np.cumsum(self.dataset.sequence_lengths[documents], dtype=np.int64)
            starts = np.arange(rows + 1) * self.config.sequence_length
            first = np.searchsorted(ends, starts, side="right")
            offsets = starts - np.where(first > 0, ends[first - 1], 0)
            random = np.random.default_rng(self.config.random_seed)
            order = [random.permutation(rows) for _ in range(-(-(self.num_samples or rows) // rows))]
            return documents, np.stack([first, offsets], axis=1), np.concatenate(order)

    return StreamRows
