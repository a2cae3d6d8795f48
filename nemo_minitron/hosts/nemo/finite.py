"""Ends a training on all ranks when a number is not finite, before it reaches the weights or a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from nemo_minitron.hosts.finite import Guard
from nemo_minitron.hosts.nemo.trainer import chunks_of, leave_context


class StopWhenNotFinite(Callback):
    """Raises DivergedError on every rank if a number is not finite on any rank, as `hosts.finite.Guard` says.

    The weights are checked when they are saved. The last checkpoint stays. This callback must stand before those that
    log and save.
    """

    def __init__(self) -> None:
        self._guard = Guard(0, "")

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        leave_context(trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._guard = Guard(trainer.global_step, str(trainer.ckpt_path or ""))
        for optimizer in trainer.optimizers:
            self._guard.watch(optimizer.mcore_optimizer, lambda: trainer.global_step + 1)

    def on_megatron_reduce_microbatches_end(
        self, step: Any, microbatch_outputs: Any, loss_reduction: Any, reduced: Any
    ) -> None:
        """Keeps the loss that is logged. Only the last pipeline stage has one."""
        self._guard.loss = float(reduced) if not step.forward_only and torch.is_tensor(reduced) else 0.0

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn == "fit" and "val_loss" in trainer.callback_metrics:
            numbers = {"held-out loss": float(trainer.callback_metrics["val_loss"])}
            self._guard.check(trainer.optimizers[0], trainer.global_step, numbers)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Checks the weights before anything is written. NeMo's callback already knows the name of the checkpoint."""
        self._guard.check_weights(trainer.optimizers[0], trainer.global_step, chunks_of(trainer))
        last = getattr(trainer.checkpoint_callback, "last_model_path", "")
        self._guard.last_good = last or self._guard.last_good
