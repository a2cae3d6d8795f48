"""Stopping a training before its last step, to go on later: the schedule and the data stay those of all steps."""

from __future__ import annotations

import signal
import threading
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from nemo_minitron.hosts.nemo.trainer import leave_context
from nemo_minitron.megatron.progress import say
from nemo_minitron.megatron.shutdown import ASKED, SAVED


class StopAfter(Callback):
    """Ends `trainer.fit` after step `step`, which the checkpoint callback has saved if it is one of its own."""

    def __init__(self, step: int) -> None:
        self.step = step

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        leave_context(trainer)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step >= self.step


class SaveWhenAsked(Callback):
    """Saves a checkpoint and ends the process, exit code 143, after the step in which any rank was asked to: by
    SIGTERM, as Slurm sends it to all of a job, or by its launcher. A later `fit` goes on from there."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        leave_context(trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda number, frame: ASKED.set())

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        asked = torch.tensor(float(ASKED.is_set()), device="cuda" if torch.cuda.is_available() else "cpu")
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        if not asked or trainer.global_step >= trainer.max_steps:
            return
        checkpoints = trainer.checkpoint_callback  # as NeMo's PreemptionCallback, which rank 0 alone can start
        checkpoints._save_last_checkpoint(trainer, checkpoints._monitor_candidates(trainer))
        torch.distributed.barrier()  # torchrun ends the others once one has left
        if trainer.is_global_zero:
            say(f"step {trainer.global_step}: told to stop, saved")
        raise SystemExit(SAVED)
