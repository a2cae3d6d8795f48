"""Bridge's settings of a training, and its training loop with this package's data and hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nemo_minitron.artifacts.run_folder import TrainingFolder
from nemo_minitron.backend.optimizer import save_whole
from nemo_minitron.backend.wrappers import unwrap
from nemo_minitron.hosts.bridge.load import load_training
from nemo_minitron.hosts.bridge.models import DTYPES, provider_of
from nemo_minitron.precisions import weights_in
from nemo_minitron.settings.distillation import Distillation
from nemo_minitron.settings.layout import Layout
from nemo_minitron.sources.tensors import ModelSource


def settings(student: ModelSource, recipe: Distillation, layout: Layout, out: Path, dataset: Any) -> Any:
    """Bridge's ConfigContainer for a training of `student` in `out`. `dataset`: the part about the data.

    Raises InputError as `models.provider_of`.
    """
    load_training()
    save_whole()
    from megatron.bridge.training import config as bridge

    provider = provider_of(student.config, precision=recipe.precision, layout=layout, training=True)
    provider.seq_length = recipe.sequence_length
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    return bridge.ConfigContainer(
        model=provider, dataset=dataset, **_optimization(recipe),
        train=bridge.TrainingConfig(
            train_iters=recipe.steps, micro_batch_size=recipe.micro_batch_size,
            global_batch_size=recipe.global_batch_size, exit_signal_handler=True, manual_gc=False,
        ),
        validation=bridge.ValidationConfig(
            eval_iters=recipe.validation_batches if recipe.validate_every else 0,
            eval_interval=recipe.validate_every or None,
        ),
        ddp=bridge.DistributedDataParallelConfig(
            use_distributed_optimizer=True, grad_reduce_in_fp32=True, overlap_grad_reduce=False,
            check_for_nan_in_grad=False, average_in_collective=False,
        ),
        checkpoint=_checkpoints(recipe, out),
        logger=bridge.LoggerConfig(log_interval=1, tensorboard_dir=str(out / "tensorboard"), filter_warnings=False),
        tokenizer=bridge.TokenizerConfig(
            tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(student.folder.resolve())
        ),
        rerun_state_machine=bridge.RerunStateMachineConfig(check_for_nan_in_loss=False),  # `StopWhenNotFinite` checks
        rng=bridge.RNGConfig(seed=recipe.seed or 1),  # Megatron needs a positive seed; nothing here draws from it
        dist=bridge.DistributedInitConfig(distributed_backend=backend, use_gloo_process_groups=True),
    )  # fmt: skip


def _optimization(recipe: Distillation) -> dict[str, Any]:
    """Adam in Megatron's distributed optimizer, with a cosine schedule and warm-up (2408.11796, table 4).

    The learning rate of each step is the one of NeMo's schedule: it begins at 1 / (warmup + 1) of the highest one.
    """
    from megatron.bridge.training import config as bridge

    warmup = min(recipe.warmup, max(0, recipe.steps - 1))
    weights = weights_in(recipe.precision)
    optimizer = bridge.OptimizerConfig(
        optimizer="adam", lr=recipe.learning_rate, min_lr=recipe.min_learning_rate, bf16=weights == "bf16", fp16=False,
        params_dtype=DTYPES[weights], weight_decay=recipe.weight_decay, adam_beta1=0.9, adam_beta2=0.95, clip_grad=1.0,
        use_distributed_optimizer=True,
    )  # fmt: skip
    scheduler = bridge.SchedulerConfig(
        lr_decay_style="cosine", lr_decay_iters=recipe.steps, lr_warmup_iters=warmup,
        lr_warmup_init=recipe.learning_rate / (warmup + 1) if warmup else 0.0,
        start_weight_decay=recipe.weight_decay, end_weight_decay=recipe.weight_decay,
        weight_decay_incr_style="constant",
    )  # fmt: skip
    return {"optimizer": optimizer, "scheduler": scheduler}


def _checkpoints(recipe: Distillation, out: Path) -> Any:
    """A checkpoint every `recipe.save_every` steps, of which the last one is kept. The next part of the training may
    run in another layout."""
    from megatron.bridge.training import config as bridge

    folder = str(TrainingFolder(out).bridge)
    return bridge.CheckpointConfig(
        save=folder, load=folder, save_interval=recipe.save_every, most_recent_k=1, ckpt_format="torch_dist",
        fully_parallel_save=True, dist_ckpt_optim_fully_reshardable=True, async_save=False,
        save_rng=False, load_rng=False,
    )  # fmt: skip


def fill_first(config: Any, student: ModelSource, random: int | None = None) -> None:
    """Fills the model before it is wrapped, unless there is a checkpoint to resume from.

    `random`: a seed; the weights are then random, the same in every layout. Raises InputError as `megatron.live.fill`.
    """
    from megatron.bridge.training.utils.checkpoint_utils import checkpoint_exists

    from nemo_minitron.megatron.live import fill
    from nemo_minitron.megatron.random_start import RandomStart

    def filled(chunks: list[Any]) -> list[Any]:
        if not checkpoint_exists(config.checkpoint.load):
            source = student if random is None else RandomStart(student.architecture, random)
            fill([unwrap(chunk) for chunk in chunks], source)
        return chunks

    config.model.register_pre_wrap_hook(filled)
