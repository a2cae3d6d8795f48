"""Megatron's GPT dataset, mended in one place. Imports Megatron: load it through `data_module`."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.gpt_dataset import GPTDataset

from nemo_minitron.artifacts.files import read_json, write_json
from nemo_minitron.artifacts.seals import damaged, sealed
from nemo_minitron.errors import InputError

NO_TOKEN = -1
WHOLE = "whole.json"  # at the end of the name of an index' record: sizes and digests of its files


class PackedDataset(GPTDataset):
    """GPTDataset over packed documents, in which the padding token is a token like any other.

    Megatron takes the tokenizer's padding id as a mark of padding: it puts token 0 in its place and its
    loss to zero. Where padding and EOS are one id (SmolLM2, Llama 3 and most others) every end of document
    would turn into token 0. Packed samples have no padding: no token is one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pad_token_id = NO_TOKEN

    def _build_document_sample_shuffle_indices(self) -> Any:
        """As Megatron, whose files of an index are written in place: a kill leaves half of one, and from then on
        every start would trip over it, or deal out document 0 again and again. Rank 0 comes first: it trusts only
        those that are as they were finished, and Megatron builds the others anew."""
        if not self.config.path_to_cache or (torch.distributed.is_initialized() and torch.distributed.get_rank()):
            return super()._build_document_sample_shuffle_indices()
        folder = Path(self.config.path_to_cache)
        base = f"{self.unique_description_hash}-{type(self).__name__}-{self.index_split.name}-"
        record = folder / f"{base}{WHOLE}"
        if not _is_whole(folder, record):
            for file in folder.glob(f"{glob.escape(base)}*"):
                file.unlink()
        found = super()._build_document_sample_shuffle_indices()
        if not record.is_file():
            write_json(record, sealed(folder, [file.name for file in folder.glob(f"{glob.escape(base)}*.npy")]))
        return found


def _is_whole(folder: Path, record: Path) -> bool:
    try:
        return not damaged(folder, read_json(record, "the record of an index"))
    except (InputError, AttributeError, KeyError, TypeError):  # there is none, or it is damaged
        return False


def windowed(first: int, samples: int, length: int) -> type[PackedDataset]:
    """PackedDataset of `length` samples from its sample `first` on; from `samples` on their positions do not count.

    So a calibration goes on where it stopped, and a layout fills up what it cannot divide. The order is that of one
    epoch, whatever number of samples NeMo asks for: it depends on the corpus, the seed and the sequence's length.
    """

    class Windowed(PackedDataset):
        def __init__(self, dataset: Any, path: Any, indices: Any, _number: Any, *arguments: Any) -> None:
            super().__init__(dataset, path, indices, None, *arguments)

        def __len__(self) -> int:
            return length

        def __getitem__(self, index: int | None) -> dict[str, Any]:
            place = (index or 0) + first
            item = super().__getitem__(place if place < samples else 0)
            return item if place < samples else item | {"loss_mask": item["loss_mask"] * 0}

    return Windowed
