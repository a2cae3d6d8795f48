"""The finetune stage: Bridge's training loop trains a student on prompts and answers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts.run_folder import TrainingFolder
from nemo_minitron.hosts.bridge.load import load_training
from nemo_minitron.hosts.distillation import without_teacher
from nemo_minitron.settings.finetuning import Finetuning
from nemo_minitron.settings.orders import FinetuneOrder
from nemo_minitron.sources.checkpoint_files import check_resumable


def finetune(order: FinetuneOrder) -> None:
    """Trains the order's student, from its last checkpoint if there is one. `hosts.protocol.Host.finetune` says what it
    leaves and raises."""
    load_training()
    from megatron.bridge.data.utils import get_dataset_provider

    from nemo_minitron.hosts.bridge.distill import Distillation
    from nemo_minitron.hosts.bridge.loop import Watch, run
    from nemo_minitron.hosts.bridge.trainer import fill_first, settings
    from nemo_minitron.sources.open import open_source

    recipe, student = order.finetuning, open_source(order.student)
    training = recipe.training()
    config = settings(student, training, order.layout, order.out, _data(order.data, recipe))
    check_resumable(TrainingFolder(order.out).bridge)
    learning = Distillation(config, **without_teacher(student.config))
    fill_first(config, student)
    run(
        config, learning.forward_step, [learning], watch=Watch(order.out, training, learning),
        datasets=get_dataset_provider(config.dataset), vocab_size=student.architecture.vocab_size,
    )  # fmt: skip


def _data(folder: Path, recipe: Finetuning) -> Any:
    """Bridge's dataset of prompts and answers. Its loss mask leaves the prompts out. The rows are padded to one length,
    because sequence parallelism and pipelines need that.

    The rows' order depends on the number of samples, so it is NeMo's, twice as in `hosts.nemo.epoch`.
    """
    from megatron.bridge.data.builders.gpt_sft import GPTSFTDatasetConfig

    return GPTSFTDatasetConfig(
        dataset_root=str(folder), seq_length=recipe.sequence_length, seed=recipe.seed,
        max_train_samples=2 * math.ceil(recipe.steps * recipe.global_batch_size * 1.005),
        do_validation=False, do_test=False,
        dataset_kwargs={"prompt_template": recipe.prompt_template, "pad_to_max_length": True},
        dataloader_type="single", num_workers=0, pin_memory=False, persistent_workers=False,
    )  # fmt: skip
