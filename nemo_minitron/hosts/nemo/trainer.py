"""NeMo's Trainer, strategy, optimizer and logger with the settings of the stages, and a running trainer's models."""

from __future__ import annotations

import os
from typing import Any

from nemo_minitron.artifacts.run_folder import TrainingFolder
from nemo_minitron.backend.optimizer import save_whole
from nemo_minitron.backend.precision import forward_fields, trained_fields
from nemo_minitron.backend.wrappers import unwrap
from nemo_minitron.precisions import weights_in
from nemo_minitron.settings.layout import Layout
from nemo_minitron.settings.recipe import Distillation


def make_trainer(layout: Layout, precision: str, *, training: bool = False, **options: Any) -> Any:
    """NeMo's Trainer with Megatron's strategy in this layout, on CPUs or GPUs.

    `training`: whether the trainer takes steps. `options`: arguments of NeMo's Trainer; `strategy` has those of the
    strategy. Raises InputError for a precision that cannot run here.
    """
    import torch
    from nemo import lightning as nl

    from nemo_minitron.hosts.nemo.models import DTYPES
    from nemo_minitron.megatron.groups import model_sizes

    gpu = torch.cuda.is_available()
    # torchrun sets LOCAL_WORLD_SIZE to the number of processes on this machine.
    here = min(layout.processes, int(os.environ.get("LOCAL_WORLD_SIZE", layout.processes)))
    strategy = nl.MegatronStrategy(
        **model_sizes(layout),
        pipeline_dtype=DTYPES[weights_in(precision)],
        ckpt_async_save=False,
        **options.pop("strategy", {}),
    )
    return nl.Trainer(
        devices=here,
        num_nodes=layout.processes // here,
        accelerator="gpu" if gpu else "cpu",
        strategy=strategy,
        plugins=_precision(precision, training),
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        **options,
    )


def _precision(precision: str, training: bool) -> Any:
    """NeMo's plugin of precision. bf16 has the values of NeMo's own `bf16_mixed` recipe, with the weights in bf16, so
    that its exporter finds the dtype that the context names.

    The plugin overwrites the config's FP8 fields and sets those that it does not get to None, so it gets all of them.
    """
    import torch
    from nemo import lightning as nl

    fields = (trained_fields if training else forward_fields)(precision)
    if precision == "fp32":
        return nl.MegatronMixedPrecision(precision="32")
    return nl.MegatronMixedPrecision(
        precision="bf16-mixed", params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16, autocast_enabled=False,
        grad_reduce_in_fp32=True, **fields,
    )  # fmt: skip


def optimizer(recipe: Distillation) -> Any:
    """Adam in Megatron's distributed optimizer, with a cosine schedule and warm-up (2408.11796, table 4)."""
    from megatron.core.optimizer import OptimizerConfig
    from nemo.lightning.pytorch.optim import CosineAnnealingScheduler, MegatronOptimizerModule

    bf16 = weights_in(recipe.precision) == "bf16"
    return MegatronOptimizerModule(
        config=OptimizerConfig(
            optimizer="adam", lr=recipe.learning_rate, min_lr=recipe.min_learning_rate, bf16=bf16, fp16=False,
            weight_decay=recipe.weight_decay, adam_beta1=0.9, adam_beta2=0.95, clip_grad=1.0,
            use_distributed_optimizer=True,
        ),
        lr_scheduler=CosineAnnealingScheduler(
            max_steps=recipe.steps, warmup_steps=min(recipe.warmup, max(0, recipe.steps - 1)),
            constant_steps=0, min_lr=recipe.min_learning_rate,
        ),
    )  # fmt: skip


def training_strategy() -> dict[str, Any]:
    """The arguments of NeMo's strategy for a trainer that takes steps."""
    from megatron.core.distributed import DistributedDataParallelConfig

    save_whole()
    return {
        "ddp": DistributedDataParallelConfig(
            use_distributed_optimizer=True, grad_reduce_in_fp32=True, overlap_grad_reduce=False
        ),
        # A training can resume in another layout. The other format also fails on the step counter of torch's Adam.
        "ckpt_optim_fully_reshardable": True,
    }


def logger(out: str, recipe: Distillation) -> Any:
    """NeMo's logger, which also saves a checkpoint every `recipe.save_every` steps and keeps the last one."""
    from lightning.pytorch.loggers import TensorBoardLogger
    from nemo import lightning as nl

    every = 1 if recipe.steps == 1 else recipe.save_every  # NeMo saves nothing at the end of a training of one step
    return nl.NeMoLogger(
        explicit_log_dir=f"{out}/nemo",  # nothing else lies there, because NeMo moves what it finds into run_N
        tensorboard=TensorBoardLogger(save_dir=out, name="tensorboard"),
        update_logger_directory=False,
        ckpt=nl.ModelCheckpoint(
            monitor=None, save_last=True, save_top_k=0, every_n_train_steps=every,
            save_on_train_epoch_end=False, save_optim_on_train_end=False, filename="{step}",
        ),
    )  # fmt: skip


def resume(out: str) -> Any:
    """NeMo's setting to resume from the last checkpoint in `out`, if there is one. Raises InputError if that checkpoint
    cannot be resumed (`check_resumable`)."""
    from nemo import lightning as nl

    from nemo_minitron.sources.checkpoint_files import check_resumable

    check_resumable(TrainingFolder(out).nemo)
    return nl.AutoResume(resume_if_exists=True, resume_ignore_no_checkpoint=True)


def chunks_of(trainer: Any) -> list[Any]:
    """This rank's GPTModel chunks of a running trainer, without their wrappers."""
    return [unwrap(chunk) for chunk in trainer.strategy.megatron_parallel]


def share_config(module: Any) -> None:
    """Gives the virtual stages after the first one the config of the first, with what was set on it while running.

    NeMo would build them from the arguments that it recorded for the checkpoint's context. The record has neither the
    padded vocabulary nor this package's forward step.
    """
    module.reinit = lambda: type(module)(module.config, optim=module.optim, tokenizer=module.tokenizer)


def leave_context(trainer: Any) -> None:
    """Removes this package's callbacks from the trainer's arguments that NeMo writes to a checkpoint's context. A
    student must load where this package is not installed."""
    config = getattr(trainer, "__io__", None)
    recorded = getattr(config, "callbacks", None)
    if config is not None and isinstance(recorded, (list, tuple)):
        config.callbacks = [c for c in recorded if not _is_ours(c)]


def _is_ours(recorded: Any) -> bool:
    """Whether a recorded callback, an object or fiddle's record of one, is of a class of this package."""
    kind = getattr(recorded, "__fn_or_cls__", type(recorded))
    return kind.__module__.startswith("nemo_minitron.")
