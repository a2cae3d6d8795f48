"""Megatron's datasets over indexed files for Bridge's loop. Every host deals out the same rows in the same order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts.logit_cache import CacheHeader
from nemo_minitron.data.index_file import check_arrays
from nemo_minitron.data.training import check_batch, index_name, training_corpora
from nemo_minitron.megatron.dataset import PackedDataset
from nemo_minitron.settings.orders import DistillOrder
from nemo_minitron.sources.tensors import ModelSource


class Corpora:
    """The training's and the validation's rows of an order.

    `config`: Bridge's part about the data. `datasets` builds them as Bridge asks; `held_out` are the batches of the
    validation, which begin anew with each one.

    Raises InputError as `data.training.training_corpora` and `check_batch`.
    """

    def __init__(self, order: DistillOrder, student: ModelSource) -> None:
        from megatron.bridge.training.config import GPTDatasetConfig

        recipe = order.distillation
        check_batch(recipe.micro_batch_size, recipe.global_batch_size)
        sources = training_corpora(
            order.train, order.validation, str(student.folder), recipe.sequence_length, recipe.global_batch_size
        )
        index = Path(order.index) / index_name(*sources)
        check_arrays(index)
        blends = [([str(source.prefix)], None) for source in sources]
        self.config = GPTDatasetConfig(
            seq_length=recipe.sequence_length, random_seed=recipe.seed, blend_per_split=[*blends, None],
            reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, path_to_cache=str(index),
            dataloader_type="single", num_workers=0, pin_memory=False, persistent_workers=False,
        )  # fmt: skip
        self._kind = _kind(recipe.teacher_cache)
        self._micro, self._total = recipe.micro_batch_size, recipe.global_batch_size
        self._validation: Any = None

    def datasets(self, numbers: Any, config: Any, tokenizer: Any = None) -> tuple[Any, Any, Any]:
        """Bridge's provider of datasets. It builds both splits together, so that Megatron shuffles them as in NeMo."""
        from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder

        builder = BlendedMegatronDatasetBuilder(self._kind, numbers, lambda: True, config)
        train, self._validation, _ = builder.build()
        return train, None, None

    def held_out(self, group: Any) -> HeldOut | None:
        """The batches of the validation for a rank of the data-parallel group. None if there is no validation."""
        return HeldOut(self._validation, self._micro, self._total, group) if self._validation is not None else None


def _kind(cache: str) -> type[PackedDataset]:
    """The class of the dataset: with a cache of logits, the one whose rows the cache has."""
    if not cache:
        return PackedDataset
    from nemo_minitron.megatron.rows import stream_rows

    return stream_rows(CacheHeader.load(cache).rows)


class HeldOut:
    """The micro-batches of a validation for this rank. `begin` goes back to the first one."""

    def __init__(self, dataset: Any, micro: int, total: int, group: Any) -> None:
        from megatron.bridge.data.samplers import build_pretraining_data_loader

        self._loader = build_pretraining_data_loader(
            dataset, 0, "single", micro, 0, False, pin_memory=False, persistent_workers=False,
            data_parallel_rank=group.rank(), data_parallel_size=group.size(), global_batch_size=total,
        )  # fmt: skip
        self.begin()

    def begin(self) -> None:
        self._batches: Iterator[Any] = iter(self._loader)

    def __iter__(self) -> HeldOut:
        return self

    def __next__(self) -> Any:
        return next(self._batches)
