"""Megatron's GPT dataset with two faults mended. The import of this file loads Megatron."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import Tensor

from nemo_minitron.artifacts.files import read_json, write_json
from nemo_minitron.artifacts.seals import damaged, sealed
from nemo_minitron.errors import InputError

NO_TOKEN = -1
WHOLE = "whole.json"  # ends the name of an index's record, which holds the sizes and digests of the index's files


class PackedDataset(GPTDataset):
    """GPTDataset over packed documents, in which the padding token is a token like any other.

    Megatron takes the tokenizer's padding id for padding: it replaces the token by token 0 and sets its loss to zero.
    Many tokenizers (SmolLM2's, Llama 3's and most others) have one id for padding and EOS, so every end of a document
    would become token 0. Packed samples have no padding, so no token is treated as padding here.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pad_token_id = NO_TOKEN

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Megatron's index of samples, from its files if those are undamaged.

        Megatron writes the files in place. A kill leaves half a file, and every later start would fail on it or deal
        out document 0 again and again. Rank 0 comes first: it keeps only files with the sizes and digests that were
        recorded when they were complete, and Megatron builds the others again.
        """
        if not self.config.path_to_cache or (torch.distributed.is_initialized() and torch.distributed.get_rank()):
            return super()._build_document_sample_shuffle_indices()
        folder = Path(self.config.path_to_cache)
        base = f"{self.unique_description_hash}-{type(self).__name__}-{self.index_split.name}-"
        record = folder / f"{base}{WHOLE}"
        if not _is_undamaged(folder, record):
            for file in folder.glob(f"{glob.escape(base)}*"):
                file.unlink()
        indices = super()._build_document_sample_shuffle_indices()
        if not record.is_file():
            write_json(record, sealed(folder, [file.name for file in folder.glob(f"{glob.escape(base)}*.npy")]))
        return indices


def _is_undamaged(folder: Path, record: Path) -> bool:
    """Whether an index's files are those that its record describes."""
    try:
        return not damaged(folder, read_json(record, "the record of an index"))
    except (InputError, AttributeError, KeyError, TypeError):  # the record is missing or damaged
        return False


def windowed(first: int, samples: int, length: int) -> type[PackedDataset]:
    """A class of PackedDataset with `length` samples: the samples `first` to `samples` - 1 of one epoch, then filling.

    `first` lets a calibration resume where it stopped. The filling samples have a `loss_mask` of zeros; they give a
    layout a number of samples that it can divide. The order is that of one epoch, however many samples the host asks
    for, so it depends on the corpus, the seed and the sequence length alone.
    """

    class Windowed(PackedDataset):
        def __init__(
            self, dataset: IndexedDataset, path: str, indices: np.ndarray, _number: object, *arguments: Any
        ) -> None:
            super().__init__(dataset, path, indices, None, *arguments)

        def __len__(self) -> int:
            return length

        def __getitem__(self, index: int | None) -> dict[str, Tensor]:
            place = (index or 0) + first  # Megatron asks for sample None to read only a batch's shape
            item = super().__getitem__(place if place < samples else 0)
            return item if place < samples else item | {"loss_mask": item["loss_mask"] * 0}

    return Windowed
