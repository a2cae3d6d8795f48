"""Rows that are cut from the stream of tokens in one way, whatever the seed. The import of this file loads Megatron."""

from __future__ import annotations

import numpy as np
from megatron.core.datasets.utils import Split
from torch import Tensor

from nemo_minitron.megatron.dataset import PackedDataset


def stream_rows(rows: int) -> type[PackedDataset]:
    """A class of PackedDataset with the stream's first `rows` rows of `sequence_length` tokens. The label of a row's
    last token is the token behind it.

    Megatron shuffles the documents of all epochs before it cuts them to rows, so another seed or one more epoch changes
    every row. A cache of logits needs rows that stay the same. Here the rows are fixed and the seed shuffles their
    order, once for each epoch; an epoch deals out every row once. A sample also has `epoch`, int64 []: the number of
    epochs before it. Validation is Megatron's own.
    """

    class StreamRows(PackedDataset):
        @property
        def training(self) -> bool:
            return self.index_split == Split.train

        def __len__(self) -> int:
            return len(self.shuffle_index) if self.training else super().__len__()

        def __getitem__(self, index: int | None) -> dict[str, Tensor | np.int64]:
            return super().__getitem__(index) | {"epoch": np.int64((index or 0) // rows)}

        def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            if not self.training:
                return super()._build_document_sample_shuffle_indices()
            # Megatron's form of an index: documents, (document, offset) of each row's first token, order of the rows.
            documents = np.asarray(self.indices)
            ends = np.cumsum(self.dataset.sequence_lengths[documents], dtype=np.int64)
            starts = np.arange(rows + 1) * self.config.sequence_length
            first = np.searchsorted(ends, starts, side="right")
            offsets = starts - np.where(first > 0, ends[first - 1], 0)
            random = np.random.default_rng(self.config.random_seed)
            order = [random.permutation(rows) for _ in range(-(-(self.num_samples or rows) // rows))]
            return documents, np.stack([first, offsets], axis=1), np.concatenate(order)

    return StreamRows
