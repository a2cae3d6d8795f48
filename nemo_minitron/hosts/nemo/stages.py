"""The distill stage: NeMo's `llm.train` trains a student on its teacher's outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nemo_minitron.backend as backend
from nemo_minitron.artifacts.files import write_json
from nemo_minitron.artifacts.run_folder import TrainingFolder
from nemo_minitron.hosts.distillation import options_of
from nemo_minitron.hosts.nemo.trainer import logger, make_trainer, optimizer, resume, training_strategy
from nemo_minitron.settings.orders import DistillOrder
from nemo_minitron.sources.tensors import ModelSource


def distill(order: DistillOrder) -> None:
    """Trains the order's student, from its last checkpoint if there is one. `hosts.protocol.Host.train` says what it
    leaves and raises."""
    backend.setup()
    from nemo.collections import llm

    from nemo_minitron.hosts.nemo.data_module import data_module
    from nemo_minitron.hosts.nemo.models import nemo_model
    from nemo_minitron.sources.open import open_source

    recipe, layout, out = order.distillation, order.layout, order.out
    student = open_source(order.student)
    data = data_module(
        order.train, order.validation, tokenizer=str(student.folder), seed=recipe.seed,
        sequence_length=recipe.sequence_length, micro_batch_size=recipe.micro_batch_size,
        global_batch_size=recipe.global_batch_size, index_folder=order.index,
    )  # fmt: skip
    if recipe.teacher_cache:
        data.dataset_cls = _rows_of(recipe.teacher_cache)
    optim = optimizer(recipe)
    validated = bool(recipe.validate_every)
    trainer = make_trainer(
        layout, recipe.precision, training=True, max_steps=recipe.steps, check_val_every_n_epoch=None,
        log_every_n_steps=1, limit_val_batches=recipe.validation_batches if validated else 0,
        val_check_interval=recipe.validate_every if validated else None, strategy=training_strategy(),
    )  # fmt: skip
    model = nemo_model(
        student.config, tokenizer=data.tokenizer, precision=recipe.precision, layout=layout, training=True, optim=optim
    )
    # They stand before NeMo's callback of checkpoints, so that each step that is saved has been logged.
    trainer.callbacks[:0] = _callbacks(order, student)
    llm.train(model, data, trainer, log=logger(str(out), recipe), resume=resume(str(out)), optim=optim)
    mark_last(trainer, out, order.stop or recipe.steps)


def _rows_of(cache: str) -> Any:
    """The class of the dataset whose rows a cache has."""
    from nemo_minitron.artifacts.logit_cache import CacheHeader
    from nemo_minitron.megatron.rows import stream_rows

    return stream_rows(CacheHeader.load(cache).rows)


def _callbacks(order: DistillOrder, student: ModelSource) -> list[Any]:
    """The callbacks of a distillation, in the order in which they must run."""
    from lightning.pytorch.callbacks import EarlyStopping

    from nemo_minitron.hosts.nemo.distill import Distillation as DistillationCallback
    from nemo_minitron.hosts.nemo.distill import FillStudent
    from nemo_minitron.hosts.nemo.finite import StopWhenNotFinite
    from nemo_minitron.hosts.nemo.loss_log import LossLog
    from nemo_minitron.hosts.nemo.stop import SaveWhenAsked, StopAfter

    recipe = order.distillation
    distillation = DistillationCallback(**options_of(order))
    callbacks = [
        FillStudent(student, random=recipe.seed if recipe.start == "random" else None),
        distillation,
        StopWhenNotFinite(),
        LossLog(str(TrainingFolder(order.out).losses), recipe.tokens_per_step, parts=distillation),
    ]
    if recipe.patience:
        callbacks.append(EarlyStopping("val_loss", patience=recipe.patience))
    callbacks += [StopAfter(order.stop)] if order.stop else []
    return [*callbacks, SaveWhenAsked()]


def mark_last(trainer: Any, out: Path, steps: int) -> None:
    """Writes `last.json` for the stage that comes next: the last checkpoint's path, relative to `out`, and the number
    of steps if the training ended before `steps`. Rank 0 writes."""
    if trainer.is_global_zero:
        from nemo.lightning.ckpt_utils import ckpt_to_dir

        path = Path(ckpt_to_dir(trainer.checkpoint_callback.last_model_path))
        early = {"stopped": trainer.global_step} if trainer.global_step < steps else {}
        write_json(TrainingFolder(out).last, {"checkpoint": str(path.resolve().relative_to(out.resolve())), **early})
