"""Ends a training on all ranks when a number is not finite, before it reaches the weights or a checkpoint."""

from __future__ import annotations

from typing import Any

from megatron.bridge.training.callbacks import Callback

from nemo_minitron.hosts.bridge.schedule import Step, around_steps
from nemo_minitron.hosts.finite import Guard
from nemo_minitron.sources.bridge_config import name_of

LOSS = "lm loss"  # Bridge's name of the loss that the forward step returns


class StopWhenNotFinite(Callback):
    """Raises DivergedError on every rank if a number is not finite on any rank, as `hosts.finite.Guard` says."""

    def __init__(self) -> None:
        self._guard = Guard(0, "")
        self._optimizer: Any = None
        self.close = around_steps(lambda step: None, self._see)  # removes the hooks of this training

    def _see(self, step: Step, losses: list[Any]) -> None:
        """Keeps this rank's loss of the step. Only the last pipeline stage has one."""
        self._guard.loss = float(sum(one[LOSS][0] for one in losses))

    def on_train_start(self, context: Any) -> None:
        state = context.state
        done = state.train_state.step
        self._guard = Guard(done, f"{state.cfg.checkpoint.save}/{name_of(done)}" if done else "")
        self._optimizer = context.optimizer
        self._guard.watch(context.optimizer, lambda: state.train_state.step + 1)

    def on_eval_end(self, context: Any) -> None:
        loss = float((context.total_loss_dict or {}).get(LOSS, 0.0))
        self._guard.check(self._optimizer, context.state.train_state.step, {"held-out loss": loss})

    def check_weights(self, step: int, chunks: list[Any]) -> None:
        """Checks the weights before anything of them is saved. Collective."""
        self._guard.check_weights(self._optimizer, step, chunks)

    def on_checkpoint_save(self, context: Any) -> None:
        self._guard.last_good = f"{context.state.cfg.checkpoint.save}/{name_of(context.state.train_state.step)}"
