"""Megatron's GPT dataset, mended in one place. Imports Megatron: load it through `data_module`."""

from __future__ import annotations

from typing import Any

from megatron.core.datasets.gpt_dataset import GPTDataset

NO_TOKEN = -1


class PackedDataset(GPTDataset):
    """GPTDataset over packed documents, in which the padding token is a token like any other.

    Megatron takes the tokenizer's padding id as a mark of padding: it puts token 0 in its place and its
    loss to zero. Where padding and EOS are one id (SmolLM2, Llama 3 and most others) every end of document
    would turn into token 0. Packed samples have no padding: no token is one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pad_token_id = NO_TOKEN


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
