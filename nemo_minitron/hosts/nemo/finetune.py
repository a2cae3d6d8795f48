"""The finetune stage: NeMo's `llm.finetune` trains a student on prompts and answers."""

from __future__ import annotations

from typing import Any

import nemo_minitron.backend as backend
from nemo_minitron.artifacts.run_folder import TrainingFolder
from nemo_minitron.hosts.distillation import without_teacher
from nemo_minitron.hosts.nemo.trainer import logger, make_trainer, optimizer, resume, training_strategy
from nemo_minitron.settings.finetuning import Finetuning
from nemo_minitron.settings.orders import FinetuneOrder


def finetune(order: FinetuneOrder) -> None:
    """Trains the order's student, from its last checkpoint if there is one. `hosts.protocol.Host.finetune` says what it
    leaves and raises."""
    backend.setup()
    from nemo.collections import llm

    from nemo_minitron.hosts.nemo.data_module import nemo_tokenizer
    from nemo_minitron.hosts.nemo.distill import Distillation, FillStudent
    from nemo_minitron.hosts.nemo.epoch import TwiceTheSamples
    from nemo_minitron.hosts.nemo.finite import StopWhenNotFinite
    from nemo_minitron.hosts.nemo.loss_log import LossLog
    from nemo_minitron.hosts.nemo.models import nemo_model
    from nemo_minitron.hosts.nemo.stages import mark_last
    from nemo_minitron.hosts.nemo.stop import SaveWhenAsked
    from nemo_minitron.sources.open import open_source

    recipe, layout, out = order.finetuning, order.layout, order.out
    student, optim = open_source(order.student), optimizer(recipe.training())
    tokenizer = nemo_tokenizer(str(student.folder), TrainingFolder(out).index)
    trainer = make_trainer(
        layout, recipe.precision, training=True, max_steps=recipe.steps, check_val_every_n_epoch=None,
        log_every_n_steps=1, limit_val_batches=0, strategy=training_strategy(),
    )  # fmt: skip
    model = nemo_model(
        student.config, tokenizer=tokenizer, precision=recipe.precision, layout=layout, training=True, optim=optim
    )
    learning = Distillation(**without_teacher(student.config))
    log = LossLog(str(TrainingFolder(out).losses), recipe.tokens_per_step, parts=learning)
    trainer.callbacks[:0] = [
        FillStudent(student), learning, StopWhenNotFinite(), log, TwiceTheSamples(), SaveWhenAsked()
    ]  # fmt: skip
    llm.finetune(
        model, _data(str(order.data), tokenizer, recipe), trainer, log=logger(str(out), recipe.training()),
        resume=resume(str(out)), optim=optim,
    )  # fmt: skip
    mark_last(trainer, out, recipe.steps)


def _data(folder: str, tokenizer: Any, recipe: Finetuning) -> Any:
    """NeMo's module over prompts and answers. Its loss mask leaves the prompts out. The rows are padded to one length,
    because sequence parallelism and pipelines need that."""
    from nemo.collections import llm

    return llm.FineTuningDataModule(
        folder, seq_length=recipe.sequence_length, tokenizer=tokenizer, micro_batch_size=recipe.micro_batch_size,
        global_batch_size=recipe.global_batch_size, seed=recipe.seed, num_workers=0, pin_memory=False,
        dataset_kwargs={"prompt_template": recipe.prompt_template, "pad_to_max_length": True},
    )  # fmt: skip
